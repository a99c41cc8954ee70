"""Blocks from one memory to another, with or without their checksum. Knows addresses and sizes, nothing of pools.

The checksum is XXH3-64 (Yann Collet, xxHash). A piece is hashed right after it was copied, while the processor's cache still has
it, so that each byte is read from memory once.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

_PIECE_BYTES = 256 << 10  # source and destination of a piece fit the second-level cache together


def copy_plain(src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids) -> None:
    """Copy rows `src_ids` of src [n, block_bytes] to rows `dst_ids` of dst [m, block_bytes]."""
    block_bytes = src.shape[1]
    src_base, dst_base = src.ctypes.data, dst.ctypes.data
    for src_id, dst_id in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        ctypes.memmove(dst_base + dst_id * block_bytes, src_base + src_id * block_bytes, block_bytes)


def copy_checked(src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids, checksums: npt.NDArray[np.uint64]) -> int:
    """Like copy_plain, comparing each block written with its checksum. Returns the place of the first that differs, or -1."""
    block_bytes = src.shape[1]
    src_base, dst_base = src.ctypes.data, dst.ctypes.data
    for index, (src_id, dst_id) in enumerate(zip(src_ids.tolist(), dst_ids.tolist(), strict=True)):
        digest = xxhash.xxh3_64()
        block = dst[dst_id]
        for start in range(0, block_bytes, _PIECE_BYTES):
            num_bytes = min(_PIECE_BYTES, block_bytes - start)
            ctypes.memmove(dst_base + dst_id * block_bytes + start, src_base + src_id * block_bytes + start, num_bytes)
            digest.update(block[start : start + num_bytes])
        if digest.intdigest() != checksums[index]:
            return index
    return -1


def checksum_blocks(src: Bytes, src_ids: Ids) -> list[int]:
    """XXH3-64 of rows `src_ids` of src [n, block_bytes]."""
    return [xxhash.xxh3_64_intdigest(src[src_id]) for src_id in src_ids.tolist()]
