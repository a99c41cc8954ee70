"""silu_mul, element by element: a program takes a run of one row."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_silu_mul
from gpu.cuda.triton.compiler import kernel

_RUN = 1024  # by 128 threads: 16 bytes of each half per thread


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_silu_mul(gate_up, out)
    num_rows, width = out.shape
    if num_rows and width:
        _silu_mul[(num_rows, -(-width // _RUN))](gate_up, out, WIDTH=width, RUN=_RUN, num_warps=4)


@kernel()
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, RUN: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * RUN + tl.arange(0, RUN)
    inside = columns < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + columns, result.to(out.dtype.element_ty), mask=inside)
