"""silu_mul: the gate of a SwiGLU feed-forward layer (Shazeer 2020)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import expect
from gpu.kernels.compiler import kernel
from gpu.kernels.fast_exp import fast_exp

Float = npt.NDArray[np.float32]

_ONE = np.float32(1.0)


def silu_mul(gate_up: Float, out: Float) -> None:
    """out = silu(gate) * up, with gate the left and up the right half of each row.

    gate_up: float32 [n, 2 * width]; out: float32 [n, width]. Contiguous. Raises ValueError for shapes.
    """
    expect(gate_up, (out.shape[0], 2 * out.shape[1]), "gate_up")
    _silu_mul(gate_up, out)


@kernel("void(float32[:,::1], float32[:,::1])")
def _silu_mul(gate_up: Float, out: Float) -> None:
    width = out.shape[1]
    for row in range(out.shape[0]):
        for i in range(width):
            gate = gate_up[row, i]
            out[row, i] = gate / (_ONE + fast_exp(-gate)) * gate_up[row, width + i]
