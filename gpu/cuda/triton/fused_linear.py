"""Linear layers of a few rows: the weights read once, in the order they lie, and everything around them done on the way.

A program makes a few columns of all rows. Its threads hold running products of their own, which are added up once, at the end;
the length of a row that is to be normalised is found in the same pass and applied to the sum. No tensor cores: with so few rows a
weight is used once or twice a byte, and what counts is how many loads are under way. Small programs, many of them resident, see
to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_linear
from gpu.cuda.triton.compiler import kernel, power_of_two


@dataclass(frozen=True, slots=True)
class Tile:
    """Of the weights that a program has in its registers at a time."""

    columns: int  # of the result
    step: int  # along a row of weights
    num_warps: int = 4


_TILE = Tile(4, 1024)
_GATED_TILE = Tile(2, 1024)  # of either half


class TritonFusedLinear:
    """`gpu.cuda.kernels.FusedLinear`. Rows of weights are of any width; best are multiples of the tile's step."""

    max_rows = 4

    def __init__(self, tile: Tile = _TILE, gated_tile: Tile = _GATED_TILE) -> None:
        self._tile, self._gated_tile = tile, gated_tile

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, norm=norm, max_rows=self.max_rows)
        _launch(x, norm, eps, weight, out, self._tile)

    def norm_silu_mul(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, norm=norm, is_gated=True, max_rows=self.max_rows)
        _launch(x, norm, eps, weight, out, self._gated_tile, is_gated=True)

    def linear_add(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, max_rows=self.max_rows)
        _launch(x, None, 0.0, weight, out, self._tile)


def _launch(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, out: Tensor, tile: Tile, *, is_gated: bool = False
) -> None:
    """Adds to `out` where there is no norm."""
    (num_rows, width), num_columns = x.shape, out.shape[1]
    if not out.numel():
        return
    _linear[(-(-num_columns // tile.columns),)](
        x,
        x if norm is None else norm,
        eps,
        weight,
        out,
        num_rows,
        num_columns,
        WIDTH=width,
        ROWS=power_of_two(num_rows),
        COLUMNS=tile.columns,
        STEP=min(tile.step, power_of_two(width)),
        HAS_NORM=norm is not None,
        IS_GATED=is_gated,
        num_warps=tile.num_warps,
    )


@kernel("num_rows", "num_columns")
def _linear(
    x: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    steps = tl.arange(0, STEP)[None, None, :]
    is_column = (columns < num_columns)[None, :, None]
    is_row = (rows < num_rows)[:, None, None]
    own_weights = weight + columns.to(tl.int64)[None, :, None] * WIDTH + steps
    own_rows = x + rows[:, None, None] * WIDTH + steps
    sums = tl.zeros([ROWS, COLUMNS, STEP], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS, STEP], tl.float32)
    squares = tl.zeros([ROWS, 1, STEP], tl.float32)
    for start in range(0, WIDTH, STEP):
        is_inside = start + steps < WIDTH
        wanted = is_column & is_inside
        factors = tl.load(own_weights + start, mask=wanted, other=0.0).to(tl.float32)
        values = tl.load(own_rows + start, mask=is_row & is_inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + start + steps, mask=is_inside, other=0.0).to(tl.float32)
        sums += values * factors
        if IS_GATED:
            factors = tl.load(own_weights + num_columns.to(tl.int64) * WIDTH + start, mask=wanted, other=0.0).to(tl.float32)
            ups += values * factors

    result = tl.sum(sums, axis=2)
    if HAS_NORM:
        shrink = tl.rsqrt(tl.sum(squares, axis=2) / WIDTH + eps)  # [ROWS, 1]
        result *= shrink
        if IS_GATED:
            result = result / (1.0 + tl.exp(-result)) * (tl.sum(ups, axis=2) * shrink)
    target = out + rows[:, None] * num_columns + columns[None, :]
    wanted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if not HAS_NORM:
        result += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=wanted)
