"""rms_norm and add_rms_norm (Zhang & Sennrich 2019): a thread block per row, kept in registers from sum to scaling."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_rms_norm
from gpu.cuda.kernels.device import WARP, lane_sum, load_words, packing, store_words
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.shapes import units_per_row

_MAX_THREADS = 512
_MAX_UNITS = 8  # of a row, per thread
_ZERO = np.float32(0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """`Kernels.rms_norm`. H is a multiple of the numbers in 16 bytes."""
    check_rms_norm(x, weight, out)
    kernel = _kernel(x.dtype, units_per_row(x.shape[1], x.dtype, "x"), False)
    kernel.launch((len(x),), x.device, units(x), units(x), units(weight), np.float32(eps), units(out))


def add_rms_norm(delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """`Kernels.add_rms_norm`. H is a multiple of the numbers in 16 bytes."""
    check_rms_norm(x, weight, out, delta)
    kernel = _kernel(x.dtype, units_per_row(x.shape[1], x.dtype, "x"), True)
    kernel.launch((len(x),), x.device, units(delta), units(x), units(weight), np.float32(eps), units(out))


@cache
def _kernel(dtype: torch.dtype, row_units: int, has_delta: bool) -> Kernel:
    width, unpack, pack = packing(dtype)
    per_thread = -(-row_units // _MAX_THREADS)
    if per_thread > _MAX_UNITS:
        raise ValueError(f"rows of {row_units * width} numbers are too long for one thread block")
    num_threads = -(-row_units // (per_thread * WARP)) * WARP
    num_warps = num_threads // WARP
    count = per_thread * width
    mean = np.float32(1.0 / max(1, row_units * width))

    def rms_norm_kernel(delta: Any, x: Any, weight: Any, eps: Any, out: Any) -> None:
        thread = cuda.threadIdx.x
        start = cuda.blockIdx.x * row_units
        values = cuda.local.array(count, np.float32)
        others = cuda.local.array(count, np.float32)
        partial = cuda.shared.array(num_warps, np.float32)
        for i in range(per_thread):
            unit = min(thread + i * num_threads, row_units - 1)
            unpack(load_words(x, start + unit), values, i * width)
            if has_delta:
                unpack(load_words(delta, start + unit), others, i * width)
        squares = _ZERO
        for i in range(per_thread):
            if has_delta:
                for j in range(i * width, (i + 1) * width):
                    values[j] += others[j]
                words = pack(values, i * width)
                unpack(words, values, i * width)  # what is normalised is what was stored
            if thread + i * num_threads < row_units:
                if has_delta:
                    store_words(x, start + thread + i * num_threads, words)
                for j in range(i * width, (i + 1) * width):
                    squares += values[j] * values[j]
        squares = lane_sum(squares, WARP)
        if thread % WARP == 0:
            partial[thread // WARP] = squares
        for i in range(per_thread):  # on its way while the others arrive
            unpack(load_words(weight, min(thread + i * num_threads, row_units - 1)), others, i * width)
        cuda.syncthreads()
        total = _ZERO
        for warp in range(num_warps):
            total += partial[warp]
        factor = np.float32(1.0) / np.float32(math.sqrt(total * mean + eps))
        for i in range(per_thread):
            if thread + i * num_threads < row_units:
                for j in range(i * width, (i + 1) * width):
                    values[j] = values[j] * factor * others[j]
                store_words(out, start + thread + i * num_threads, pack(values, i * width))

    return Kernel(rms_norm_kernel, "int64, int64, int64, float32, int64", num_threads)
