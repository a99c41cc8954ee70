"""copy_blocks and hash_blocks: whole blocks from one pool to another, their checksum in the same pass.

A thread block takes a part of one block, or several whole ones when they are small, so that few large blocks and many small ones
fill the device alike. Each thread has several loads on their way before it needs the first. A checksum is a sum over words
(`gpu.cuda.reference.sum64_rows`): threads add what they have, in any order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_copy_blocks, check_hash_blocks
from gpu.cuda.kernels.device import (
    SIMULATED,
    UNIT_BYTES,
    WARP,
    add_to_sum,
    address,
    hashed,
    lane_sum_u64,
    load_i64,
    load_pair,
    store_pair,
    u64,
)
from gpu.cuda.kernels.launch import Kernel, units

_THREADS = 16 if SIMULATED else 256
_UNITS = 8  # per thread: loads in flight


def copy_blocks(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
    """`Kernels.copy_blocks`."""
    check_copy_blocks(src, src_ids, dst, dst_ids, sums)
    _launch(src, src_ids, dst, dst_ids, sums, copies=True)


def hash_blocks(src: Tensor, ids: Tensor, sums: Tensor) -> None:
    """`Kernels.hash_blocks`."""
    check_hash_blocks(src, ids, sums)
    _launch(src, ids, src, ids, sums, copies=False)


def _launch(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None, *, copies: bool) -> None:
    if sums is not None:
        sums.zero_()
    row_units = src.shape[1] // UNIT_BYTES
    if row_units == 0 or len(src_ids) == 0:
        return
    lanes = min(_THREADS, 1 << (row_units - 1).bit_length())  # threads per row
    grid = (-(-len(src_ids) * lanes // _THREADS), -(-row_units // (lanes * _UNITS)))
    rows = (len(src), len(dst), len(src_ids), row_units)
    ids = (address(src_ids), address(dst_ids), address(src_ids if sums is None else sums))
    _kernel(lanes, copies, sums is not None).launch(grid, src.device, units(src), units(dst), *ids, *rows)


@cache
def _kernel(lanes: int, copies: bool, hashes: bool) -> Kernel:
    group = min(lanes, WARP)  # threads that add up before they reach for memory

    def copy_blocks_kernel(
        src: Any,
        dst: Any,
        src_ids: Any,
        dst_ids: Any,
        sums: Any,
        num_src: int,
        num_dst: int,
        num_rows: int,
        row_units: int,
    ) -> None:
        thread = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x  # [row, lane]
        row = thread // lanes
        lane = thread % lanes
        first = cuda.blockIdx.y * (lanes * _UNITS) + lane
        last = row_units
        source, target = 0, 0
        if row < num_rows:
            source, target = load_i64(src_ids, row), load_i64(dst_ids, row)
        if row >= num_rows or source < 0 or source >= num_src or target < 0 or target >= num_dst:
            last, source, target = 0, 0, 0
        source = source * row_units
        target = target * row_units
        words = cuda.local.array((_UNITS, 2), np.uint64)
        for i in range(_UNITS):
            unit = first + i * lanes
            if unit < last:
                words[i, 0], words[i, 1] = load_pair(src, source + unit)
        total = u64(0)
        for i in range(_UNITS):
            unit = first + i * lanes
            if unit < last:
                low, high = words[i, 0], words[i, 1]
                if copies:
                    store_pair(dst, target + unit, (low, high))
                if hashes:
                    total = u64(total + hashed(low, 2 * unit + 1) + hashed(high, 2 * unit + 2))
        if hashes:
            total = lane_sum_u64(total, group)
            if lane % group == 0 and last > 0:
                add_to_sum(sums, row, total)

    return Kernel(copy_blocks_kernel, "int64, " * 8 + "int64", _THREADS)
