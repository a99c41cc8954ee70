"""`device`'s functions for a device: a few instructions each. An address is an int64 and points to global memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import extending
from torch import Tensor

WARP = 32

_FULL_WARP = 0xFFFFFFFF
_GLOBAL = 1  # the address space
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _PAIR = ir.VectorType(_I32, 4), ir.VectorType(_I64, 2)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)

u64 = np.uint64  # for kernels: a number as an unsigned word

types: Any = numba.types
Emit = Callable[[Any, Any, Any, list[Any]], Any]
Typed = Callable[..., tuple[Any, Emit]]


def address(tensor: Tensor) -> int:
    """Raises ValueError for a tensor of the host, whose address means nothing to a device."""
    if tensor.device.type == "cpu":
        raise ValueError(f"a tensor on {tensor.device} is not in a CUDA device's memory")
    return tensor.data_ptr()


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inlined before types are inferred, so that arrays of registers stay registers."""
    inlined: Callable[..., Any] = cuda.jit(device=True, inline="always")(function)
    return inlined


def intrinsic(typed: Typed) -> Any:
    """`typed` gives a call's signature and what emits its instructions."""
    return extending.intrinsic(typed)


def _load(kind: Any, result: Any, align: int) -> Any:
    """A function (address, index) -> what lies there; `kind` as LLVM has it, `result` as Numba does."""

    def emit(context: Any, builder: Any, signature: Any, args: list[Any]) -> Any:
        pointer = builder.gep(builder.inttoptr(args[0], kind.as_pointer(_GLOBAL)), [args[1]])
        loaded = builder.load(pointer, align=align)
        if not isinstance(kind, ir.VectorType):
            return loaded
        parts = [builder.extract_element(loaded, _I32(i)) for i in range(kind.count)]
        return context.make_tuple(builder, signature.return_type, parts)

    def typed(typing_context: Any, base: Any, index: Any) -> tuple[Any, Emit]:
        return result(types.int64, types.int64), emit

    return intrinsic(typed)


def _store(kind: Any, value: Any, align: int) -> Any:
    """A function (address, index, value)."""

    def emit(context: Any, builder: Any, signature: Any, args: list[Any]) -> Any:
        pointer = builder.gep(builder.inttoptr(args[0], kind.as_pointer(_GLOBAL)), [args[1]])
        stored = args[2]
        if isinstance(kind, ir.VectorType):
            stored = ir.Constant(kind, ir.Undefined)
            for i in range(kind.count):
                stored = builder.insert_element(stored, builder.extract_value(args[2], i), _I32(i))
        builder.store(stored, pointer, align=align)
        return context.get_dummy_value()

    def typed(typing_context: Any, base: Any, index: Any, what: Any) -> tuple[Any, Emit]:
        return types.void(types.int64, types.int64, value), emit

    return intrinsic(typed)


load_words = _load(_WORDS, types.UniTuple(types.uint32, 4), 16)
load_pair = _load(_PAIR, types.UniTuple(types.uint64, 2), 16)
load_i32 = _load(_I32, types.int32, 4)
load_i64 = _load(_I64, types.int64, 8)
load_f32 = _load(_F32, types.float32, 4)
store_words = _store(_WORDS, types.UniTuple(types.uint32, 4), 16)
store_pair = _store(_PAIR, types.UniTuple(types.uint64, 2), 16)
store_f32 = _store(_F32, types.float32, 4)


@intrinsic
def add_to_sum(typing_context: Any, base: Any, index: Any, value: Any) -> tuple[Any, Emit]:
    """The uint64 at `index`, atomically."""

    def emit(context: Any, builder: Any, signature: Any, args: list[Any]) -> Any:
        pointer = builder.gep(builder.inttoptr(args[0], _I64.as_pointer(_GLOBAL)), [args[1]])
        builder.atomic_rmw("add", pointer, args[2], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), emit


@intrinsic
def as_float(typing_context: Any, bits: Any) -> tuple[Any, Emit]:
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], _F32)


@intrinsic
def as_bits(typing_context: Any, value: Any) -> tuple[Any, Emit]:
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _I32)


@intrinsic
def pack_bf16(typing_context: Any, low: Any, high: Any) -> tuple[Any, Emit]:
    """Two float32 to a word of two bfloat16, to nearest, ties to even."""
    return types.uint32(types.float32, types.float32), _assembly("cvt.rn.bf16x2.f32 $0, $2, $1;", _I32, "=r,f,f")


@intrinsic
def exp2(typing_context: Any, x: Any) -> tuple[Any, Emit]:
    """2^x to 2 units in the last place; what is below the smallest normal number is 0."""
    return types.float32(types.float32), _assembly("ex2.approx.ftz.f32 $0, $1;", _F32, "=f,f")


@intrinsic
def reciprocal(typing_context: Any, x: Any) -> tuple[Any, Emit]:
    """1 / x to 1 unit in the last place; of infinity 0."""
    return types.float32(types.float32), _assembly("rcp.approx.ftz.f32 $0, $1;", _F32, "=f,f")


def _assembly(text: str, result: Any, constraints: str) -> Emit:
    def emit(context: Any, builder: Any, signature: Any, args: list[Any]) -> Any:
        return builder.asm(ir.FunctionType(result, [arg.type for arg in args]), text, constraints, args, side_effect=False)

    return emit


@device
def hashed(word: Any, place: Any) -> Any:
    """What the word at `place`, counted from 1, adds to its block's sum64."""
    z = word ^ (u64(place) * _GOLDEN)
    z = (z ^ (z >> _HALF)) * _FACTOR
    z = (z ^ (z >> _HALF)) * _FACTOR
    return z ^ (z >> _HALF)


@device
def lane_swap(value: Any, step: int) -> Any:
    """The value of the thread whose place differs in bit `step`; all of the warp must come here."""
    return cuda.shfl_xor_sync(_FULL_WARP, value, step)


@device
def lane_get(value: Any, place: Any) -> Any:
    """The value of the thread at `place` of the warp; all of the warp must come here."""
    return cuda.shfl_sync(_FULL_WARP, value, place)


@device
def warp_any(flag: Any) -> Any:
    """Whether any thread of the warp says so; all of it must come here."""
    return cuda.any_sync(_FULL_WARP, flag)


@device
def lane_max(value: Any, lanes: int) -> Any:
    step = lanes // 2
    while step > 0:
        value = max(value, cuda.shfl_xor_sync(_FULL_WARP, value, step))
        step //= 2
    return value


@device
def lane_sum(value: Any, lanes: int) -> Any:
    """Over the `lanes` (a power of two up to 32) threads that this one stands among; all of the warp must come here."""
    step = lanes // 2
    while step > 0:
        value += cuda.shfl_xor_sync(_FULL_WARP, value, step)
        step //= 2
    return value


@device
def lane_sum_u64(value: Any, lanes: int) -> Any:
    total = np.int64(value)
    step = lanes // 2
    while step > 0:
        total += cuda.shfl_xor_sync(_FULL_WARP, total, step)
        step //= 2
    return np.uint64(total)
