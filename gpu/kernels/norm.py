"""rms_norm and add_rms_norm: root-mean-square normalisation (Zhang & Sennrich 2019), alone and after a residual sum."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]


def rms_norm(x: Float, weight: Float, eps: float, out: Float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row.

    x, out: float32 [n, width], may be the same array; weight: float32 [width]. All contiguous. Raises ValueError for shapes.
    """
    expect(out, x.shape, "out")
    expect(weight, x.shape[1:], "weight")
    _rms_norm(x, weight, eps, out)


def add_rms_norm(x: Float, residual: Float, weight: Float, eps: float, out: Float) -> None:
    """residual += x, then out = rms_norm(residual). Types and errors as in rms_norm; `out` may be `x`, not `residual`."""
    expect(out, x.shape, "out")
    expect(residual, x.shape, "residual")
    expect(weight, x.shape[1:], "weight")
    _add_rms_norm(x, residual, weight, eps, out)


@kernel("void(float32[:,::1], float32[::1], float64, float32[:,::1])")
def _rms_norm(x: Float, weight: Float, eps: float, out: Float) -> None:
    width = x.shape[1]
    for row in range(x.shape[0]):
        squares = np.float32(0.0)
        for i in range(width):
            squares += x[row, i] * x[row, i]
        factor = np.float32(1.0 / math.sqrt(squares / width + eps))
        for i in range(width):
            out[row, i] = x[row, i] * factor * weight[i]


@kernel("void(float32[:,::1], float32[:,::1], float32[::1], float64, float32[:,::1])")
def _add_rms_norm(x: Float, residual: Float, weight: Float, eps: float, out: Float) -> None:
    width = x.shape[1]
    for row in range(x.shape[0]):
        squares = np.float32(0.0)
        for i in range(width):
            value = residual[row, i] + x[row, i]
            residual[row, i] = value
            squares += value * value
        factor = np.float32(1.0 / math.sqrt(squares / width + eps))
        for i in range(width):
            out[row, i] = residual[row, i] * factor * weight[i]
