"""Whole blocks: rows of bytes from one array to another, and their checksums. Knows nothing of pools.

The checksum is XXH3-64 (Yann Collet, xxHash) of a whole block. A call runs from end to end without the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from gpu.kernels.copy_rows import MIN_HASHED_BYTES, copy_and_hash_rows, hash_rows

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

# More than this would push everything else out of the second-level cache; it goes past it.
_STREAMING_BYTES = 1 << 20
_STREAMING_ALIGNMENT = 64


def copy_checked(src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids, checksums: npt.NDArray[np.uint64]) -> int:
    """Copy rows `src_ids` of src [n, block_bytes] to rows `dst_ids` of dst [m, block_bytes], comparing each with its checksum.

    Returns the place of the first that differs, or -1. Raises ValueError for arrays that are not contiguous rows of one size,
    IndexError for ids outside of them.
    """
    _check_copy(src, src_ids, dst, dst_ids)
    if len(checksums) != len(src_ids):
        raise ValueError(f"{len(checksums)} checksums for {len(src_ids)} blocks")
    if src.shape[1] < MIN_HASHED_BYTES:
        dst[dst_ids] = src[src_ids]
        found = np.array(checksum_blocks(dst, dst_ids), dtype=np.uint64)
    else:
        found = np.empty(len(src_ids), np.uint64)
        streaming = _streams(dst, len(src_ids))
        copy_and_hash_rows(src.ctypes.data, src_ids, dst.ctypes.data, dst_ids, src.shape[1], found, streaming)
    wrong = np.flatnonzero(found != checksums)
    return int(wrong[0]) if len(wrong) else -1


def checksum_blocks(src: Bytes, src_ids: Ids) -> list[int]:
    """XXH3-64 of rows `src_ids` of src [n, block_bytes]. Errors as in copy_checked."""
    _check_rows(src, src_ids)
    if src.shape[1] < MIN_HASHED_BYTES:
        return [xxhash.xxh3_64_intdigest(src[src_id]) for src_id in src_ids.tolist()]
    sums = np.empty(len(src_ids), np.uint64)
    hash_rows(src.ctypes.data, src_ids, src.shape[1], sums)
    return [int(each) for each in sums]


def _check_copy(src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids) -> None:
    _check_rows(src, src_ids)
    _check_rows(dst, dst_ids)
    if src.shape[1] != dst.shape[1]:
        raise ValueError(f"blocks of {src.shape[1]} bytes cannot go where blocks of {dst.shape[1]} lie")
    if len(src_ids) != len(dst_ids):
        raise ValueError(f"{len(src_ids)} blocks cannot go to {len(dst_ids)} places")
    if not dst.flags.writeable:
        raise ValueError("the destination is read-only")


def _check_rows(array: Bytes, ids: Ids) -> None:
    """After this nothing can be read or written outside of the array."""
    if array.dtype != np.uint8 or array.ndim != 2 or not array.flags.c_contiguous:
        raise ValueError(f"blocks are contiguous rows of bytes, not {array.dtype} {array.shape} with strides {array.strides}")
    if len(ids) and (ids.min() < 0 or ids.max() >= len(array)):
        raise IndexError(f"block ids {ids.min()}..{ids.max()} are not all inside {len(array)} blocks")


def _streams(dst: Bytes, num_blocks: int) -> bool:
    is_aligned = dst.ctypes.data % _STREAMING_ALIGNMENT == 0 and dst.shape[1] % _STREAMING_ALIGNMENT == 0
    return is_aligned and num_blocks * dst.shape[1] > _STREAMING_BYTES
