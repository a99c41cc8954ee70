"""silu_mul: the gate of a SwiGLU feed-forward layer (Shazeer 2020). A thread works on one unit of gate and of up at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_silu_mul
from gpu.cuda.kernels.device import SIMULATED, exp2, load_words, packing, reciprocal, store_words
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.shapes import units_per_row

_THREADS = 16 if SIMULATED else 256
_UNITS = 2  # per thread: loads in flight
_LOG2E = np.float32(1.4426950408889634)
_ONE = np.float32(1.0)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """`Kernels.silu_mul`. I is a multiple of the numbers in 16 bytes."""
    check_silu_mul(gate_up, out)
    row_units = units_per_row(out.shape[1], out.dtype, "out")
    grid = (len(out), -(-row_units // (_THREADS * _UNITS)))
    _kernel(out.dtype).launch(grid, out.device, units(gate_up), units(out), row_units)


@cache
def _kernel(dtype: torch.dtype) -> Kernel:
    width, unpack, pack = packing(dtype)
    count = _UNITS * width

    def silu_mul_kernel(gate_up: Any, out: Any, row_units: int) -> None:
        row = cuda.blockIdx.x
        gate = cuda.local.array(count, np.float32)
        up = cuda.local.array(count, np.float32)
        first = cuda.blockIdx.y * (_THREADS * _UNITS) + cuda.threadIdx.x
        for i in range(_UNITS):
            unit = min(first + i * _THREADS, row_units - 1)
            unpack(load_words(gate_up, 2 * row * row_units + unit), gate, i * width)
            unpack(load_words(gate_up, (2 * row + 1) * row_units + unit), up, i * width)
        for i in range(count):
            gate[i] = gate[i] * reciprocal(_ONE + exp2(-gate[i] * _LOG2E)) * up[i]
        for i in range(_UNITS):
            unit = first + i * _THREADS
            if unit < row_units:
                store_words(out, row * row_units + unit, pack(gate, i * width))

    return Kernel(silu_mul_kernel, "int64, int64, int64", _THREADS)
