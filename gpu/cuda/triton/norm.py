"""rms_norm and add_rms_norm, one program per row: the row is read once and stays in registers between its two uses."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_rms_norm
from gpu.cuda.triton.compiler import kernel, power_of_two


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_rms_norm(x, weight, out)
    _launch(x, x, weight, eps, out, has_delta=False)


def add_rms_norm(delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_rms_norm(x, weight, out, delta)
    _launch(delta, x, weight, eps, out, has_delta=True)


def _launch(delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor, *, has_delta: bool) -> None:
    num_rows, width = x.shape
    padded = power_of_two(width)
    if num_rows and width:
        _norm_rows[(num_rows,)](
            delta, x, weight, eps, out, WIDTH=width, PADDED=padded, HAS_DELTA=has_delta, num_warps=_num_warps(padded)
        )


def _num_warps(padded: int) -> int:
    """16 numbers per thread: enough loads in flight in few enough threads that they meet quickly."""
    return min(max(padded // 512, 1), 16)


@kernel()
def _norm_rows(
    delta: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    row = tl.load(x + start + columns, mask=inside, other=0.0)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        change = tl.load(delta + start + columns, mask=inside, other=0.0)
        row = (row.to(tl.float32) + change.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + start + columns, row, mask=inside)
    wide = row.to(tl.float32)
    shrink = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    tl.store(out + start + columns, (wide * shrink * factors).to(out.dtype.element_ty), mask=inside)
