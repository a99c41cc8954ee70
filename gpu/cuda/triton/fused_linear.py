"""Linear layers of a few rows: the weights read once, in the order they lie, and everything around them done on the way.

A program makes a few columns of all rows. Its threads hold running sums of their own, which are added up once, at the end; the
length of a row that is to be normalised is found in the same pass and applied to the sum. No tensor cores: a weight is used once
for each row, and what counts is how many loads are under way. Small programs, many of them resident, see to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_linear
from gpu.cuda.triton.compiler import inlined, kernel, power_of_two


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program makes, and by how many threads: a power of two each, the latter at least 32."""

    columns: int
    threads: int = 128


_RUN = 8  # weights that a thread takes at a time: 16 bytes of bfloat16
_TILE = Tile(4)
_GATED_TILE = Tile(2)  # of either half


class TritonFusedLinear:
    """`gpu.cuda.kernels.FusedLinear`. Rows of weights are of any width; multiples of 8 come sixteen bytes at a time."""

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
        THREADS=tile.threads,
        RUN=_RUN,
        HAS_NORM=norm is not None,
        IS_GATED=is_gated,
        num_warps=tile.threads // 32,
    )


@inlined
def _side_by_side(values: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr, RUN: tl.constexpr) -> Any:
    """[rows or 1, columns or 1, THREADS, RUN] as [ROWS * COLUMNS * THREADS, RUN]: every thread repeats what it has."""
    return tl.reshape(tl.broadcast_to(values, [ROWS, COLUMNS, THREADS, RUN]), [ROWS * COLUMNS * THREADS, RUN])


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
    THREADS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
) -> None:
    # Every array is [n * THREADS, RUN], and what is at place i belongs to thread i % THREADS: nothing changes hands in the loop.
    first = tl.program_id(0) * COLUMNS
    runs = tl.arange(0, RUN)[None, :]
    norm_at = tl.arange(0, THREADS)[:, None] * RUN + runs
    x_parts = tl.arange(0, ROWS * THREADS)
    x_at = (x_parts % THREADS)[:, None] * RUN + runs
    is_row = (x_parts // THREADS < num_rows)[:, None]
    own_rows = x + (x_parts // THREADS)[:, None] * WIDTH + x_at
    weight_parts = tl.arange(0, COLUMNS * THREADS)
    weight_at = (weight_parts % THREADS)[:, None] * RUN + runs
    own_columns = (first + weight_parts // THREADS)[:, None]
    own_weights = weight + own_columns.to(tl.int64) * WIDTH + weight_at
    sums = tl.zeros([ROWS * COLUMNS * THREADS], tl.float32)
    ups = tl.zeros([ROWS * COLUMNS * THREADS], tl.float32)
    squares = tl.zeros([ROWS * THREADS], tl.float32)
    for start in range(0, WIDTH, THREADS * RUN):
        wanted = (own_columns < num_columns) & (start + weight_at < WIDTH)
        factors = tl.load(own_weights + start, mask=wanted, other=0.0, eviction_policy="evict_first").to(tl.float32)
        values = tl.load(own_rows + start, mask=is_row & (start + x_at < WIDTH), other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(values * values, axis=1)
            scales = tl.load(norm + start + norm_at, mask=start + norm_at < WIDTH, other=0.0).to(tl.float32)
            values *= _side_by_side(scales[None, None, :, :], ROWS, 1, THREADS, RUN)
        values = _side_by_side(tl.reshape(values, [ROWS, 1, THREADS, RUN]), ROWS, COLUMNS, THREADS, RUN)
        factors = _side_by_side(tl.reshape(factors, [1, COLUMNS, THREADS, RUN]), ROWS, COLUMNS, THREADS, RUN)
        sums += tl.sum(values * factors, axis=1)
        if IS_GATED:
            below = own_weights + num_columns.to(tl.int64) * WIDTH + start
            factors = tl.load(below, mask=wanted, other=0.0, eviction_policy="evict_first").to(tl.float32)
            factors = _side_by_side(tl.reshape(factors, [1, COLUMNS, THREADS, RUN]), ROWS, COLUMNS, THREADS, RUN)
            ups += tl.sum(values * factors, axis=1)

    result = tl.sum(tl.reshape(sums, [ROWS, COLUMNS, THREADS]), axis=2)
    if HAS_NORM:
        shrink = tl.rsqrt(tl.sum(tl.reshape(squares, [ROWS, THREADS]), axis=1) / WIDTH + eps)[:, None]
        result *= shrink
        if IS_GATED:
            up = tl.sum(tl.reshape(ups, [ROWS, COLUMNS, THREADS]), axis=2) * shrink
            result = result / (1.0 + tl.exp(-result)) * up
    rows = tl.arange(0, ROWS)[:, None]
    columns = (first + tl.arange(0, COLUMNS))[None, :]
    target = out + rows * num_columns + columns
    wanted = (rows < num_rows) & (columns < num_columns)
    if not HAS_NORM:
        result += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=wanted)
