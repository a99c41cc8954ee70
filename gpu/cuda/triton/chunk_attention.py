"""chunk_attention: causal attention of a prompt's chunk over its sequence's blocks (FlashAttention-2, Dao 2023), of one or many.

A tile's rows are the query heads of one KV head's group, token after token: keys and values are read once for the group, and few
tokens fill a tile. Tiles of keys that all of a tile's queries see are attended without masks, the rest on the diagonal with.
Programs start with the last tokens, which have most to do, and the heads of a tile run side by side. Of many chunks each program
finds out for itself which one its tile is of, so that the host need not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels import Chunks
from gpu.cuda.kernels.checks import check_chunk_attention, check_varlen_chunk_attention
from gpu.cuda.triton.compiler import dot_precision, inlined, is_interpreted, kernel, pool_rows, product
from gpu.cuda.triton.heads import check_head_dim

MAX_CHUNKS = 32  # of one launch

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Shape:
    rows: int
    tokens: int  # of a tile of keys
    num_warps: int
    num_stages: int


def chunk_attention(
    q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, out: Tensor, num_sms: int
) -> None:
    """See `gpu.cuda.kernels.Kernels`. `num_sms`: multiprocessors of the device."""
    check_chunk_attention(q, kv_pool, layer, block_table, context_len, out)
    check_head_dim(kv_pool.shape[5])
    lens = (len(q),)
    if any(lens):
        shape = _choose_shape(lens, q, kv_pool, num_sms)
        _launch(shape, lens, q, kv_pool, layer, block_table, None, context_len, scale, out)


def varlen_chunk_attention(
    q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor, num_sms: int
) -> None:
    """See `gpu.cuda.kernels.Kernels`. `num_sms`: multiprocessors of the device."""
    if len(chunks.lens) == 1:  # there is nothing to find out
        chunk_attention(q, kv_pool, layer, chunks.block_tables[0], chunks.context_lens[0], scale, out, num_sms)
        return
    check_varlen_chunk_attention(q, kv_pool, layer, chunks, out)
    check_head_dim(kv_pool.shape[5])
    shape = _choose_shape(chunks.lens, q, kv_pool, num_sms)
    for start in range(0, len(chunks.lens), MAX_CHUNKS):
        part = slice(start, start + MAX_CHUNKS)
        lens, spans, tables = chunks.lens[part], chunks.spans[:, part], chunks.block_tables[part]
        if any(lens):
            _launch(shape, lens, q, kv_pool, layer, tables, spans, 0, scale, out)


def _launch(
    shape: _Shape,
    lens: Sequence[int],
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    spans: Tensor | None,
    context_len: int,
    scale: float,
    out: Tensor,
) -> None:
    """Without `spans` there is one chunk, which is all of q, and `block_tables` is its own."""
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    group = q.shape[1] // num_kv_heads
    _attend_tile[(num_kv_heads, _num_tiles(lens, shape, group))](
        q,
        kv_pool,
        layer,
        num_blocks,
        num_layers,
        block_tables,
        block_tables.stride(0),
        block_tables if spans is None else spans,
        0 if spans is None else spans.stride(0),
        len(lens),
        context_len,
        len(q),
        scale * _LOG2_E,
        out,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=shape.rows,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TILE=shape.tokens,
        PRECISION=dot_precision(q.dtype),
        WIDEN=is_interpreted(),
        CHUNKS=1 if spans is None else MAX_CHUNKS,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def _num_tiles(lens: Sequence[int], shape: _Shape, group: int) -> int:
    tokens = shape.rows // group
    return sum(-(-num_tokens // tokens) for num_tokens in lens)


def _choose_shape(lens: Sequence[int], q: Tensor, kv_pool: Tensor, num_sms: int) -> _Shape:
    """The largest tile of which there are enough to fill three quarters of the device; a short chunk has the smallest.

    Read off the compiled kernels for heads of 128 bfloat16, wider ones halve the tile of keys: 128 rows are two warpgroups with
    about 200 registers per thread and four buffers of keys and values (161 of 227 KB), so that loads run three tiles ahead.
    Tiles of 128 keys leave room for fewer buffers than that, and four warps for 128 rows spill. The smaller shapes leave room for
    two programs on a multiprocessor, one of which computes while the other waits. float32 is for tests: small, soon compiled.

    Stages are counted twice, once for the block ids that a load's addresses come from and once for the load itself.
    """
    num_kv_heads, head_dim = kv_pool.shape[3], kv_pool.shape[5]
    group = q.shape[1] // num_kv_heads
    if q.dtype == torch.float32:
        shapes = [_Shape(16, 32, 4, 2), _Shape(64, 32, 4, 2)]
        fitting = [shape for shape in shapes if shape.rows >= group][:1]
    else:
        tokens = min(max(8192 // head_dim, 16), 64)
        shapes = [_Shape(128, tokens, 8, 7), _Shape(64, tokens, 4, 3), _Shape(16, tokens, 4, 7)]
        fitting = [shape for shape in shapes if shape.rows >= group]
    if not fitting:
        raise ValueError(f"a group of {group} query heads is larger than a tile")
    for shape in fitting:
        if 4 * _num_tiles(lens, shape, group) * num_kv_heads >= 3 * num_sms:
            return shape
    return fitting[-1]


@inlined
def _chunk_of_tile(tile: tl.tensor, lens: tl.tensor, num_chunks: tl.tensor, TOKENS: tl.constexpr, CHUNKS: tl.constexpr) -> Any:
    """(which chunk, which of its tiles) a tile is, of all counted through."""
    numbers = tl.arange(0, CHUNKS)
    num_tokens = tl.load(lens + numbers, mask=numbers < num_chunks, other=0)
    ends = tl.cumsum(tl.cdiv(num_tokens, TOKENS), 0)
    is_before = ends <= tile
    return tl.sum(is_before.to(tl.int32), 0), tile - tl.max(tl.where(is_before, ends, 0), 0)


@kernel(
    *("layer", "num_blocks", "num_layers", "table_stride", "span_stride", "num_chunks", "context_len", "num_tokens"),
    small=("block_table", "spans"),
)
def _attend_tile(
    q: tl.tensor,
    kv_pool: tl.tensor,
    layer: tl.tensor,
    num_blocks: tl.tensor,
    num_layers: tl.tensor,
    block_table: tl.tensor,
    table_stride: tl.tensor,
    spans: tl.tensor,
    span_stride: tl.tensor,
    num_chunks: tl.tensor,
    context_len: tl.tensor,
    num_tokens: tl.tensor,
    scale_log2: tl.tensor,
    out: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    LAYER_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_STRIDE
    VALUES: tl.constexpr = NUM_KV_HEADS * HEAD_STRIDE
    TOKENS: tl.constexpr = ROWS // GROUP
    head = tl.program_id(0)
    tile_at = tl.num_programs(1) - 1 - tl.program_id(1)
    first = 0
    if CHUNKS > 1:
        chunk, tile_at = _chunk_of_tile(tile_at, spans + span_stride, num_chunks, TOKENS, CHUNKS)
        first = tl.load(spans + chunk)
        num_tokens = tl.load(spans + span_stride + chunk)
        context_len = tl.load(spans + 2 * span_stride + chunk)
        block_table += chunk * table_stride
    start = tile_at * TOKENS
    before = context_len - num_tokens
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    tokens = start + rows // GROUP
    positions = before + tokens
    inside = (rows < TOKENS * GROUP) & (tokens < num_tokens)
    at = ((first + tokens).to(tl.int64) * NUM_KV_HEADS + head) * GROUP + rows % GROUP
    queries = tl.load(q + at[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0)
    keys = kv_pool + layer.to(tl.int64) * LAYER_STRIDE + head * HEAD_STRIDE
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    seen_by_all = (before + start + 1) // TILE
    end = tl.cdiv(tl.minimum(before + start + TOKENS, context_len), TILE)
    for MASKED in tl.static_range(2):
        for tile in range(seen_by_all if MASKED else 0, end if MASKED else seen_by_all):
            columns = tile * TILE + tl.arange(0, TILE)
            if MASKED:
                wanted = columns < context_len
                offsets = pool_rows(block_table, columns, wanted, num_blocks, num_layers, BLOCK_SIZE, LAYER_STRIDE, HEAD_DIM)
                places = keys + offsets[:, None] + dims[None, :]
                k = tl.load(places, mask=wanted[:, None], other=0.0)
                v = tl.load(places + VALUES, mask=wanted[:, None], other=0.0)
            else:
                offsets = pool_rows(block_table, columns, None, num_blocks, num_layers, BLOCK_SIZE, LAYER_STRIDE, HEAD_DIM)
                places = keys + offsets[:, None] + dims[None, :]
                k = tl.load(places)
                v = tl.load(places + VALUES)
            scores = product(queries, tl.trans(k), tl.zeros([ROWS, TILE], tl.float32), PRECISION, WIDEN)
            if MASKED:
                scores = tl.where(columns[None, :] <= positions[:, None], scores, float("-inf"))
            top = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - top[:, None])
            shrink = tl.exp2(highest - top)
            total = total * shrink + tl.sum(weights, axis=1)
            sums = product(weights.to(v.dtype), v, sums * shrink[:, None], PRECISION, WIDEN)
            highest = top
    result = sums / total[:, None]
    tl.store(out + at[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])
