"""gather_kv: a sequence's keys and values out of their blocks into two dense arrays. Pure copying, 16 bytes at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_gather_kv
from gpu.cuda.kernels.device import SIMULATED, address, load_i32, load_pair, store_pair
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.shapes import log2, units_per_row

_THREADS = 16 if SIMULATED else 256
_UNITS = 4  # per thread: loads in flight


def gather_kv(kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
    """`Kernels.gather_kv`. A head and a block are powers of two, a head whole units of 16 bytes."""
    check_gather_kv(kv_pool, layer, block_table, num_tokens, k_out, v_out)
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    head_shift = log2(units_per_row(head_dim, kv_pool.dtype, "a head"), "a head in units")
    kernel = _kernel(head_shift, log2(block_size, "block_size"), num_kv_heads)
    grid = (-(-(num_tokens << head_shift) // (_THREADS * _UNITS)), 2 * num_kv_heads)
    places = (num_blocks, num_layers, layer, address(block_table), num_tokens << head_shift)
    kernel.launch(grid, kv_pool.device, units(kv_pool), *places, units(k_out), units(v_out))


@cache
def _kernel(head_shift: int, block_shift: int, num_kv_heads: int) -> Kernel:
    block_units = head_shift + block_shift  # as a power of two: the run of one block's tokens

    def gather_kv_kernel(
        kv_pool: Any, num_blocks: int, num_layers: int, layer: int, table: Any, num_units: int, k_out: Any, v_out: Any
    ) -> None:
        plane = cuda.blockIdx.y  # of keys, then of values: [2, num_kv_heads]
        out, head = (k_out, plane) if plane < num_kv_heads else (v_out, plane - num_kv_heads)
        first = cuda.blockIdx.x * (_THREADS * _UNITS) + cuda.threadIdx.x
        found = cuda.local.array((_UNITS, 2), np.uint64)
        blocks = cuda.local.array(_UNITS, np.int32)
        for i in range(_UNITS):
            unit = first + i * _THREADS
            blocks[i] = load_i32(table, unit >> block_units) if unit < num_units else -1
        for i in range(_UNITS):
            if 0 <= blocks[i] < num_blocks:
                run = (np.int64(blocks[i]) * num_layers + layer) * 2 * num_kv_heads + plane
                place = (first + i * _THREADS) & ((1 << block_units) - 1)
                found[i, 0], found[i, 1] = load_pair(kv_pool, (run << block_units) + place)
        for i in range(_UNITS):
            if 0 <= blocks[i] < num_blocks:
                store_pair(out, head * num_units + first + i * _THREADS, (found[i, 0], found[i, 1]))

    return Kernel(gather_kv_kernel, "int64, int64, int64, int64, int64, int64, int64, int64", _THREADS)
