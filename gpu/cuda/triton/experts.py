"""A feed-forward layer of many experts: rows are sorted by expert on the device, and those of a tile go through one together.

Five launches. Each row finds its experts and counts itself in with them; each (row, expert) pair then takes a place among its
expert's, in no order, which no result depends on; two products, in which every program finds out from the counts which expert its
tile is of, so that the host need not say; and the sum of what a row's experts made of it. Grids are as large as any choice of the
rows could need, programs beyond that end at once. (The layout of MegaBlocks, Gale et al. 2023, without its padding.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_experts
from gpu.cuda.triton.compiler import dot_precision, is_interpreted, kernel, power_of_two, product

_PAIRS = 128  # that one program places
_RUN = 1024  # numbers of a row that one program adds up


@dataclass(frozen=True)
class _Shape:
    """A tile of a product: rows of one expert, columns of the output, and how many of what is summed over it takes at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By how many rows an expert has on average. Few rows are a matter of reading the weights: small tiles, deep loads.
SHAPES = (_Shape(16, 32, 128, 4, 3), _Shape(32, 64, 128, 4, 3), _Shape(64, 128, 64, 8, 3), _Shape(128, 128, 64, 8, 3))


def experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, num_chosen: int, normalizes: bool, out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_experts(x, logits, gate_up, down, num_chosen, out)
    num_rows, num_experts = logits.shape
    if not x.numel():
        return
    num_pairs, padded = num_rows * num_chosen, power_of_two(num_experts)
    counts = torch.zeros((2, num_experts), dtype=torch.int32, device=x.device)  # pairs of each expert; those that have a place
    chosen = torch.empty((2, num_pairs), dtype=torch.int32, device=x.device)  # the expert of each pair; pairs by expert
    shares = torch.empty(num_pairs, dtype=torch.float32, device=x.device)
    _choose[(num_rows,)](
        logits,
        chosen,
        shares,
        counts,
        NUM_EXPERTS=num_experts,
        PADDED=padded,
        CHOSEN=num_chosen,
        PLACES=power_of_two(num_chosen),
        NORMALIZES=normalizes,
        num_warps=1,
    )
    _place[(-(-num_pairs // _PAIRS),)](
        chosen, counts, num_pairs, NUM_EXPERTS=num_experts, PADDED=padded, PAIRS=_PAIRS, num_warps=4
    )
    inner = torch.empty((num_pairs, down.shape[2]), dtype=x.dtype, device=x.device)
    parts = torch.empty((num_pairs, x.shape[1]), dtype=x.dtype, device=x.device)
    shape = _choose_shape(num_pairs, num_experts)
    _multiply(shape, x, gate_up, counts, chosen[1], num_chosen, inner, is_gated=True)
    _multiply(shape, inner, down, counts, chosen[1], 1, parts, is_gated=False)
    width = x.shape[1]
    _mix[(num_rows, -(-width // _RUN))](parts, shares, out, WIDTH=width, CHOSEN=num_chosen, RUN=_RUN, num_warps=4)


def _choose_shape(num_pairs: int, num_experts: int) -> _Shape:
    rows = num_pairs / num_experts
    return next((shape for shape in SHAPES if rows <= shape.rows), SHAPES[-1])


def _multiply(
    shape: _Shape, x: Tensor, weight: Tensor, counts: Tensor, order: Tensor, divisor: int, out: Tensor, *, is_gated: bool
) -> None:
    """out[pair] of x[pair // divisor] and the weight of the pair's expert."""
    num_pairs, num_columns = out.shape
    num_experts = len(weight)
    num_tiles = num_pairs // shape.rows + min(num_experts, num_pairs)
    _multiply_tile[(-(-num_columns // shape.columns), num_tiles)](
        x,
        weight,
        weight.stride(0),
        counts,
        order,
        out,
        NUM_EXPERTS=num_experts,
        PADDED=power_of_two(num_experts),
        DIVISOR=divisor,
        WIDTH=x.shape[1],
        COLUMNS=num_columns,
        IS_TURNED=not weight[0].is_contiguous(),
        IS_GATED=is_gated,
        ROWS=shape.rows,
        TILE=shape.columns,
        DEPTH=shape.depth * 2 // x.dtype.itemsize,
        PRECISION=dot_precision(x.dtype),
        WIDEN=is_interpreted(),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


@kernel()
def _choose(
    logits: tl.tensor,
    chosen: tl.tensor,
    shares: tl.tensor,
    counts: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    PLACES: tl.constexpr,
    NORMALIZES: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    ids, places = tl.arange(0, PADDED), tl.arange(0, PLACES)
    left = tl.load(logits + row.to(tl.int64) * NUM_EXPERTS + ids, mask=ids < NUM_EXPERTS, other=float("-inf"))
    left = tl.where(left == left, left, float("-inf"))  # what is not a number is last
    weights = tl.exp(left - tl.max(left, axis=0))
    picks = tl.zeros([PLACES], tl.int32)
    picked = tl.zeros([PLACES], tl.float32)
    for place in tl.static_range(CHOSEN):
        best = tl.minimum(tl.argmax(left, axis=0), NUM_EXPERTS - 1)
        picks = tl.where(places == place, best, picks)
        picked = tl.where(places == place, tl.sum(tl.where(ids == best, weights, 0.0), axis=0), picked)
        left = tl.where(ids == best, float("-inf"), left)
    shares_of_row = picked / (tl.sum(picked, axis=0) if NORMALIZES else tl.sum(weights, axis=0))
    wanted = places < CHOSEN
    tl.store(chosen + row * CHOSEN + places, picks, mask=wanted)
    tl.store(shares + row * CHOSEN + places, shares_of_row, mask=wanted)
    tl.atomic_add(counts + picks, 1, mask=wanted, sem="relaxed")


@kernel("num_pairs")
def _place(
    chosen: tl.tensor,
    counts: tl.tensor,
    num_pairs: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    wanted = pairs < num_pairs
    experts = tl.load(chosen + pairs, mask=wanted, other=0)
    ids = tl.arange(0, PADDED)
    count = tl.load(counts + ids, mask=ids < NUM_EXPERTS, other=0)
    before = tl.sum(tl.where(ids[None, :] < experts[:, None], count[None, :], 0), axis=1)
    taken = tl.atomic_add(counts + NUM_EXPERTS + experts, 1, mask=wanted, sem="relaxed")
    tl.store(chosen + num_pairs + before + taken, pairs, mask=wanted)


@kernel(small=("order",))
def _multiply_tile(
    x: tl.tensor,
    weight: tl.tensor,
    weight_stride: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    out: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    DIVISOR: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_TURNED: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    ids = tl.arange(0, PADDED)
    count = tl.load(counts + ids, mask=ids < NUM_EXPERTS, other=0)
    tiles = (count + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if expert >= NUM_EXPERTS:
        return
    before = ids < expert
    first = tl.sum(tl.where(before, count, 0), axis=0)
    end = first + tl.sum(tl.where(ids == expert, count, 0), axis=0)
    places = first + (tile - tl.sum(tl.where(before, tiles, 0), axis=0)) * ROWS + tl.arange(0, ROWS)
    is_row = places < end
    pairs = tl.load(order + places, mask=is_row, other=0)

    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    depths = tl.arange(0, DEPTH)
    is_column = columns < COLUMNS
    all_columns: tl.constexpr = 2 * COLUMNS if IS_GATED else COLUMNS
    down: tl.constexpr = all_columns if IS_TURNED else 1  # from a number to the next one that is summed over
    aside: tl.constexpr = 1 if IS_TURNED else WIDTH  # and to that of the next column
    own = weight + expert.to(tl.int64) * weight_stride + columns[None, :] * aside + depths[:, None] * down
    rows = x + (pairs // DIVISOR).to(tl.int64)[:, None] * WIDTH + depths[None, :]
    sums = tl.zeros([ROWS, TILE], tl.float32)
    ups = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        inside = start + depths < WIDTH
        values = tl.load(rows + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        wanted = is_column[None, :] & inside[:, None]
        sums = product(values, tl.load(own + start * down, mask=wanted, other=0.0), sums, PRECISION, WIDEN)
        if IS_GATED:
            factors = tl.load(own + start * down + COLUMNS * aside, mask=wanted, other=0.0)
            ups = product(values, factors, ups, PRECISION, WIDEN)
    if IS_GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * ups
    target = out + pairs.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@kernel()
def _mix(
    parts: tl.tensor, shares: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, CHOSEN: tl.constexpr, RUN: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * RUN + tl.arange(0, RUN)
    inside = columns < WIDTH
    total = tl.zeros([RUN], tl.float32)
    for place in tl.static_range(CHOSEN):
        part = tl.load(parts + (row * CHOSEN + place) * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(shares + row * CHOSEN + place) * part
    tl.store(out + row * WIDTH + columns, total.to(out.dtype.element_ty), mask=inside)
