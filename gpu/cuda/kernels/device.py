"""What the Numba kernels are written with: memory in units of 16 bytes, bits of floats, sums over neighbouring threads.

Numba's own arrays know neither bfloat16 nor 16-byte loads, so kernels take addresses. On a device an address is an int64 and
these functions are a handful of instructions (`intrinsics`); in the CUDA simulator an address is a `Memory` that checks its
bounds, and they are Python (`simulated`). Kernels are the same for both. Which it is says nothing about whether there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numba.core import config

P = ParamSpec("P")
R = TypeVar("R")

SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])

_forms: Any = import_module("gpu.cuda.kernels." + ("simulated" if SIMULATED else "intrinsics"))
add_to_sum = _forms.add_to_sum
address = _forms.address
as_bits = _forms.as_bits
as_float = _forms.as_float
exp2 = _forms.exp2
hashed = _forms.hashed
lane_get = _forms.lane_get
lane_max = _forms.lane_max
lane_sum = _forms.lane_sum
lane_sum_u64 = _forms.lane_sum_u64
lane_swap = _forms.lane_swap
load_f32 = _forms.load_f32
load_i32 = _forms.load_i32
load_i64 = _forms.load_i64
load_pair = _forms.load_pair
load_words = _forms.load_words
pack_bf16 = _forms.pack_bf16
reciprocal = _forms.reciprocal
store_f32 = _forms.store_f32
store_pair = _forms.store_pair
store_words = _forms.store_words
u64 = _forms.u64
warp_any = _forms.warp_any

UNIT_BYTES = 16
WARP: int = _forms.WARP


def device(function: Callable[P, R]) -> Callable[P, R]:
    """A function for kernels to call. It is inlined; so are those it calls."""
    inlined: Callable[P, R] = _forms.device(function)
    return inlined


def packing(dtype: torch.dtype) -> tuple[int, Callable[..., None], Callable[..., Any]]:
    """How numbers of `dtype` lie in a unit: (how many, unpack, pack).

    Both are for kernels. unpack(words, values, at): the four 32-bit words of a unit to float32 values[at:]. pack(values, at):
    back, rounded to the nearest, ties to even.
    """
    return _PACKINGS[dtype]


@device
def _unpack_f32(words: Any, values: Any, at: int) -> None:
    values[at] = as_float(words[0])
    values[at + 1] = as_float(words[1])
    values[at + 2] = as_float(words[2])
    values[at + 3] = as_float(words[3])


@device
def _pack_f32(values: Any, at: int) -> Any:
    return as_bits(values[at]), as_bits(values[at + 1]), as_bits(values[at + 2]), as_bits(values[at + 3])


@device
def _unpack_bf16(words: Any, values: Any, at: int) -> None:
    _unpack_two(words[0], values, at)
    _unpack_two(words[1], values, at + 2)
    _unpack_two(words[2], values, at + 4)
    _unpack_two(words[3], values, at + 6)


@device
def _unpack_two(word: Any, values: Any, at: int) -> None:
    """A bfloat16 is the upper half of a float32."""
    values[at] = as_float(np.uint32(word << np.uint32(16)))
    values[at + 1] = as_float(np.uint32(word & np.uint32(0xFFFF0000)))


@device
def _pack_bf16(values: Any, at: int) -> Any:
    return (
        pack_bf16(values[at], values[at + 1]),
        pack_bf16(values[at + 2], values[at + 3]),
        pack_bf16(values[at + 4], values[at + 5]),
        pack_bf16(values[at + 6], values[at + 7]),
    )


_PACKINGS: dict[torch.dtype, tuple[int, Callable[..., None], Callable[..., Any]]] = {
    torch.float32: (4, _unpack_f32, _pack_f32),
    torch.bfloat16: (8, _unpack_bf16, _pack_bf16),
}
