"""paged_attention: decode attention over blocks, split along the context and merged (Flash-Decoding, Dao et al. 2023).

A program takes the queries of one KV head's group, padded to the 16 rows of a tensor core's tile, over one part of one
sequence's context, tile by tile with a running maximum and sum. Into how many parts contexts are cut is settled on the host by
what it knows, so that the launch can be captured; where the cuts lie is settled on the device by each sequence's length, so that
short contexts in long tables still share the work out. A second, small kernel merges the parts.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_paged_attention
from gpu.cuda.triton.compiler import (
    dot_precision,
    is_interpreted,
    kernel,
    pool_rows,
    power_of_two,
    product,
)
from gpu.cuda.triton.heads import check_head_dim

_LOG2_E = 1.4426950408889634
_PROGRAMS_PER_SM = 2  # that are resident at a time: shared memory for the tiles in flight allows no more
_WAVES = 4  # of programs at least, where there are many: so that contexts of unlike length even out
_MAX_SPLITS = 64
_MERGED_AT_ONCE = 32


def workspace_floats(max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int) -> int:
    """See `gpu.cuda.kernels.Kernels`: weighed values, maximum and sum of every part of every query head.

    Grows with `max_seqs`, and so holds for fewer sequences, though these are cut into more parts.
    """
    parts = min(-(-2 * _WAVES * _PROGRAMS_PER_SM * num_sms // num_kv_heads) + max_seqs, max_seqs * _MAX_SPLITS)
    return parts * num_heads * (head_dim + 2)


@cache
def plan_splits(num_seqs: int, num_kv_heads: int, max_tiles: int, num_sms: int) -> tuple[int, int]:
    """(parts that each context is cut into, tiles that a part has at least).

    Few sequences: as many programs as are resident at once, down to one tile each. More: some waves of programs of which the last
    is nearly full, and of at least four tiles, so that filling the pipeline of loads is not most of their work.
    """
    programs, resident = num_seqs * num_kv_heads, _PROGRAMS_PER_SM * num_sms
    if programs * 8 <= resident:
        return max(min(resident // programs, max_tiles, _MAX_SPLITS), 1), 1
    fewest = _WAVES * resident // programs
    splits = max(range(fewest, 2 * fewest + 2), key=lambda splits: _share_of_waves(programs * splits, resident)) if fewest else 1
    return max(min(splits, max_tiles, _MAX_SPLITS), 1), 4


def _share_of_waves(programs: int, resident: int) -> float:
    """How full the waves are on average, up to what does not matter."""
    return round(programs / (-(-programs // resident) * resident), 2)


def paged_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    workspace: Tensor,
    num_sms: int,
) -> None:
    """See `gpu.cuda.kernels.Kernels`. `num_sms`: multiprocessors of the device."""
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_seqs, num_heads, _ = q.shape
    floats = workspace_floats(num_seqs, num_heads, num_kv_heads, head_dim, num_sms)
    check_paged_attention(q, kv_pool, layer, block_tables, context_lens, out, workspace, floats)
    check_head_dim(head_dim)
    if not num_seqs:
        return
    group = num_heads // num_kv_heads
    is_wide = q.dtype == torch.float32  # for tests: small, soon compiled
    tile = 32 if is_wide else min(max(8192 // head_dim, 16), 64)
    max_tokens = block_tables.shape[1] * block_size
    num_splits, min_tiles = plan_splits(num_seqs, num_kv_heads, -(-max_tokens // tile), num_sms)
    num_parts = num_seqs * num_heads * num_splits
    _attend_part[(num_kv_heads, num_splits, num_seqs)](
        q,
        kv_pool,
        layer,
        num_blocks,
        num_layers,
        block_tables,
        block_tables.stride(0),
        max_tokens,
        context_lens,
        scale * _LOG2_E,
        out,
        workspace,
        num_parts,
        num_splits,
        min_tiles,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(power_of_two(group), 16),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE=tile,
        IS_SPLIT=num_splits > 1,
        PRECISION=dot_precision(q.dtype),
        WIDEN=is_interpreted(),
        num_warps=4,
        num_stages=2 if is_wide else 7,  # loads of block ids and of what they lead to are three tiles ahead each
    )
    if num_splits > 1:
        _merge_parts[(num_heads, num_seqs)](
            workspace,
            num_parts,
            context_lens,
            max_tokens,
            out,
            num_splits,
            min_tiles,
            HEAD_DIM=head_dim,
            TILE=tile,
            AT_ONCE=_MERGED_AT_ONCE,
            num_warps=4,
        )


@kernel(
    "layer",
    "num_blocks",
    "num_layers",
    "table_stride",
    "max_tokens",
    "num_parts",
    "num_splits",
    "min_tiles",
    small=("block_tables", "context_lens"),
)
def _attend_part(
    q: tl.tensor,
    kv_pool: tl.tensor,
    layer: tl.tensor,
    num_blocks: tl.tensor,
    num_layers: tl.tensor,
    block_tables: tl.tensor,
    table_stride: tl.tensor,
    max_tokens: tl.tensor,
    context_lens: tl.tensor,
    scale_log2: tl.tensor,
    out: tl.tensor,
    workspace: tl.tensor,
    num_parts: tl.tensor,
    num_splits: tl.tensor,
    min_tiles: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    LAYER_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_STRIDE
    head = tl.program_id(0)  # the heads of a block lie side by side: their programs run side by side
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    context_len = tl.minimum(tl.load(context_lens + seq), max_tokens)
    num_tiles = tl.cdiv(context_len, TILE)
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), min_tiles)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    if IS_SPLIT and first >= last:
        return

    members = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    in_group = members < GROUP
    rows = (seq * NUM_KV_HEADS + head) * GROUP + members
    queries = tl.load(q + rows[:, None] * HEAD_DIM + dims[None, :], mask=in_group[:, None], other=0.0)
    keys = kv_pool + layer.to(tl.int64) * LAYER_STRIDE + head * HEAD_STRIDE
    table = block_tables + seq * table_stride
    highest = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    totals = tl.zeros([PADDED_GROUP, TILE], tl.float32)  # added up over the warps after the loop: once, not for each tile
    sums = tl.zeros([PADDED_GROUP, HEAD_DIM], tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        wanted = tokens < context_len
        at = pool_rows(table, tokens, wanted, num_blocks, num_layers, BLOCK_SIZE, LAYER_STRIDE, HEAD_DIM)
        places = keys + at[:, None] + dims[None, :]
        k = tl.load(places, mask=wanted[:, None], other=0.0)
        v = tl.load(places + NUM_KV_HEADS * HEAD_STRIDE, mask=wanted[:, None], other=0.0)
        scores = product(queries, tl.trans(k), tl.zeros([PADDED_GROUP, TILE], tl.float32), PRECISION, WIDEN)
        scores = tl.where(wanted[None, :], scores * scale_log2, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - top[:, None])
        shrink = tl.exp2(highest - top)
        totals = totals * shrink[:, None] + weights
        sums = product(weights.to(v.dtype), v, sums * shrink[:, None], PRECISION, WIDEN)
        highest = top

    total = tl.sum(totals, axis=1)
    if IS_SPLIT:
        parts = rows * num_splits + split
        # The workspace: sums [parts, HEAD_DIM], maxima [parts], totals [parts].
        maxima = workspace + num_parts.to(tl.int64) * HEAD_DIM
        tl.store(workspace + parts[:, None] * HEAD_DIM + dims[None, :], sums, mask=in_group[:, None])
        tl.store(maxima + parts, highest, mask=in_group)
        tl.store(maxima + num_parts + parts, total, mask=in_group)
    else:
        result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=in_group[:, None])


@kernel("num_parts", "max_tokens", "num_splits", "min_tiles", small=("context_lens",))
def _merge_parts(
    workspace: tl.tensor,
    num_parts: tl.tensor,
    context_lens: tl.tensor,
    max_tokens: tl.tensor,
    out: tl.tensor,
    num_splits: tl.tensor,
    min_tiles: tl.tensor,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    seq = tl.program_id(1).to(tl.int64)
    row = seq * tl.num_programs(0) + tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    num_tiles = tl.cdiv(tl.minimum(tl.load(context_lens + seq), max_tokens), TILE)
    num_written = tl.cdiv(num_tiles, tl.maximum(tl.cdiv(num_tiles, num_splits), min_tiles))
    part_maxima = workspace + num_parts.to(tl.int64) * HEAD_DIM
    highest = float("-inf")
    total = 0.0
    sums = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, num_written, AT_ONCE):
        parts = start + tl.arange(0, AT_ONCE)
        inside = parts < num_written
        at = row * num_splits + parts
        maxima = tl.load(part_maxima + at, mask=inside, other=float("-inf"))
        totals = tl.load(part_maxima + num_parts + at, mask=inside, other=0.0)
        values = tl.load(workspace + at[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0)
        top = tl.maximum(highest, tl.max(maxima, axis=0))
        shares = tl.exp2(maxima - top)
        shrink = tl.exp2(highest - top)
        total = total * shrink + tl.sum(totals * shares, axis=0)
        sums = sums * shrink + tl.sum(values * shares[:, None], axis=0)
        highest = top
    result = sums / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty))
