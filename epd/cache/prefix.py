"""What a full KV block's content is called: a hash chained over everything that its KV depends on.

The KV of a token depends on all tokens before it, and where a token is an image placeholder on the image itself. So block i is
named by the name of block i-1, its own token ids, and for each image that reaches into it the image's hash, grid and which of its
rows lie where. Two prompts with equal placeholder ids and different images differ from the first block that the image touches.

The idea of chained block hashes is vLLM's (automatic prefix caching); SGLang's radix tree answers the same question. Names are
128 bits of BLAKE2b and not of a faster checksum: one cache serves many clients, and a name that a client can forge hands out
another client's context. A block costs about a microsecond.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from epd.step import Int32Array
from protocol.messages import MMItem

_NUM_BYTES = 16


def block_hashes(
    token_ids: Int32Array, items: Sequence[MMItem], block_size: int, salt: str = "", known: Sequence[int] = ()
) -> tuple[int, ...]:
    """Names of all full blocks of a prompt, first to last.

    Args:
        token_ids: [num_tokens] int32, placeholders expanded.
        items: the prompt's images; their ranges do not overlap.
        salt: separates caches that must not share content.
        known: names of the first blocks where they have been computed before; taken over as they are.

    Returns:
        num_tokens // block_size numbers below 2**128. A chain is the same however it was cut into calls.
    """
    num_blocks = len(token_ids) // block_size
    if len(known) >= num_blocks:
        return tuple(known[:num_blocks])
    data = np.ascontiguousarray(token_ids, dtype="<i4").data.cast("B")
    parent = known[-1].to_bytes(_NUM_BYTES, "little") if known else _root(block_size, salt)
    images = _image_parts(items, block_size, len(known), num_blocks)
    stride = 4 * block_size
    names = list(known)
    for block in range(len(known), num_blocks):
        name = blake2b(parent, digest_size=_NUM_BYTES)
        name.update(data[block * stride : (block + 1) * stride])
        for part in images.get(block, ()):
            name.update(part)
        parent = name.digest()
        names.append(int.from_bytes(parent, "little"))
    return tuple(names)


def _root(block_size: int, salt: str) -> bytes:
    return blake2b(salt.encode(), digest_size=_NUM_BYTES, person=struct.pack("<8sq", b"epd-kv", block_size)).digest()


def _image_parts(items: Sequence[MMItem], block_size: int, first: int, end: int) -> dict[int, list[bytes]]:
    """Per block what it holds of which image. Fixed-size fields and a digest, so that no two lists of parts read the same."""
    parts: dict[int, list[bytes]] = {}
    for item in items:
        image = blake2b(item.mm_hash.encode(), digest_size=_NUM_BYTES).digest()
        item_end = item.offset + item.num_tokens
        for block in range(max(first, item.offset // block_size), min(end, -(-item_end // block_size))):
            start = max(item.offset, block * block_size)
            stop = min(item_end, (block + 1) * block_size)
            place = (start - block * block_size, stop - start, start - item.offset, item.grid_t, item.grid_h, item.grid_w)
            parts.setdefault(block, []).append(image + struct.pack("<6q", *place))
    return parts
