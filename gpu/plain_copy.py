"""What `gpu.copy` does, in NumPy and the xxHash library: for small blocks, where a compiled kernel is not worth its start."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


def copy_checked(src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids, checksums: npt.NDArray[np.uint64]) -> int:
    """Copy rows `src_ids` of src [n, block_bytes] to rows `dst_ids` of dst [m, block_bytes], comparing each with its checksum.

    Returns the place of the first that differs, or -1. Raises IndexError for ids outside.
    """
    if len(dst_ids) and dst_ids.min() < 0:
        raise IndexError(f"block ids {dst_ids.min()}..{dst_ids.max()} are not all inside {len(dst)} blocks")
    dst[dst_ids] = src[src_ids]
    found = checksum_blocks(dst, dst_ids)
    return next((place for place, (is_, should) in enumerate(zip(found, checksums.tolist(), strict=True)) if is_ != should), -1)


def checksum_blocks(src: Bytes, src_ids: Ids) -> list[int]:
    """XXH3-64 of rows `src_ids` of src."""
    return [xxhash.xxh3_64_intdigest(src[src_id]) for src_id in src_ids.tolist()]
