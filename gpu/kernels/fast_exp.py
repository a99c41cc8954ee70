"""exp for float32 that vectorises: the C library's is called once per number, and softmax and silu spend their time in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature

from gpu.kernels.compiler import emitted, inlined

_F = np.float32
_LOWEST, _HIGHEST = _F(-87.0), _F(88.0)  # beyond these float32 has nothing left to say
_LOG2_E, _LN_2, _HALF, _ONE = _F(1.4426950408889634), _F(0.6931471805599453), _F(0.5), _F(1.0)
_C6, _C5, _C4 = _F(1.9875691500e-4), _F(1.3981999507e-3), _F(8.3334519073e-3)
_C3, _C2, _C1 = _F(4.1665795894e-2), _F(1.6666665459e-1), _F(5.0000001201e-1)
_BIAS, _SHIFT = np.int32(127), np.int32(23)


@emitted
def _float_of_bits(_context: Any, bits: Any) -> tuple[Signature, Callable[..., Any]]:
    def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), emit


@inlined
def fast_exp(x: np.float32) -> np.float32:
    """e^x to a few units in the last place, for x in [-87, 88]; x outside of it is taken as the nearer end, so never infinite.

    The polynomial is that of Cephes' expf (Stephen L. Moshier).
    """
    x = min(max(x, _LOWEST), _HIGHEST)
    power = np.floor(x * _LOG2_E + _HALF)
    rest = x - power * _LN_2
    series = ((((_C6 * rest + _C5) * rest + _C4) * rest + _C3) * rest + _C2) * rest + _C1
    mantissa = series * rest * rest + rest + _ONE
    value: np.float32 = mantissa * _float_of_bits(np.int32((np.int32(power) + _BIAS) << _SHIFT))
    return value
