"""chunk_attention: the queries of a prompt's chunk over the keys and values in their sequence's blocks, each up to its own token.

As in FlashAttention (Dao et al. 2022): tile by tile with a running maximum and sum, the scores never leave the cache. All is laid
out with queries as columns: scores are [tokens of a block, columns], sums [head_dim, columns]. So keys and values are read where
they lie in the pool, one number at a time for a whole row of columns, and maximum, exponential and sum need no step across the
lanes of a vector. Only the queries are turned around, once per tile.

A query's result is the same to the last bit in whatever chunk and beside whatever queries it comes: the order of its sums depends
on its position alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.core.typing.templates import Signature

from gpu.kernels.checks import check_block_ids, check_layer, expect
from gpu.kernels.compiler import emitted, inlined, kernel
from gpu.kernels.fast_exp import fast_exp
from gpu.team import Team

Float = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

_HAS_WIDE_VECTORS = bool(binding.get_host_cpu_features().get("avx512f"))
_NUM_LANES = 16 if _HAS_WIDE_VECTORS else 8
_NUM_VECTORS = 2
_PANEL = _NUM_LANES * _NUM_VECTORS  # columns that are worked on at a time
_NUM_ROWS = 8 if _HAS_WIDE_VECTORS else 4  # rows by vectors: as many sums as fit the registers
_MAX_COLUMNS = 96  # of a tile: enough to make up for reading a block's keys and values
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LANES = ir.VectorType(ir.FloatType(), _NUM_LANES)
_FUSED = ("contract",)


def chunk_attention(
    q: Float,
    kv_pool: Float,
    layer: int,
    block_table: Ints,
    context_len: int,
    scale: float,
    out: Float,
    team: Team | None = None,
) -> None:
    """out[i, h] = softmax(scale * q[i, h] . K) V over the first context_len - n + i + 1 tokens of one sequence.

    q, out: float32 [n, num_heads, head_dim], the last n of the sequence's context_len tokens, whose own keys and values are in
    the pool already; query head h belongs to KV head h // (num_heads / num_kv_heads); kv_pool: float32 [num_blocks, num_layers,
    2, num_kv_heads, block_size, head_dim]; block_table: int32 [>= ceil(context_len / block_size)]. All contiguous. Tiles are
    shared out over `team`; the result does not depend on it. Raises ValueError for shapes, IndexError for ids.
    """
    num_blocks, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_tokens, num_heads, _ = q.shape
    expect(q, (num_tokens, num_heads, head_dim), "q")
    expect(out, q.shape, "out")
    check_layer(layer, kv_pool)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")
    if num_tokens > context_len:
        raise ValueError(f"{num_tokens} queries cannot be the last of a context of {context_len} tokens")
    used = -(-context_len // block_size)
    if used > len(block_table):
        raise ValueError(f"{context_len} tokens take {used} blocks and the block table has {len(block_table)}")
    check_block_ids(block_table[:used], num_blocks)

    def attend(first_head: int, last_head: int, first_token: int, last_token: int) -> None:
        _chunk_attention(q, kv_pool, layer, block_table, context_len, scale, out, first_head, last_head, first_token, last_token)

    if team is None or team.num_threads == 1:
        attend(0, num_kv_heads, 0, num_tokens)
    else:
        step = _tile_tokens(num_heads // num_kv_heads)
        starts = range(0, num_tokens, step)
        team.run(attend, [(head, head + 1, at, min(at + step, num_tokens)) for at in starts for head in range(num_kv_heads)])


def _tile_tokens(group: int) -> int:
    """Queries of one tile, each in a column for every head of the group."""
    return max(1, _MAX_COLUMNS // group)


def _product(num_rows: int, *, onto: bool) -> Callable[[int, int, int, int, int, int, int, int], None]:
    """An operation on one panel: out[r, c] = sum over d of left[r, d] * right[d, c], all by address and strides in numbers.

    With `onto` it is added to out[r, c] * shrink[c].
    """

    @emitted
    def product(
        _context: Any, left: Any, row_stride: Any, step_stride: Any, right: Any, width: Any, depth: Any, shrink: Any, out: Any
    ) -> tuple[Signature, Callable[..., Any]]:
        def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
            left, row_stride, step_stride, right, width, depth, shrink, out = args
            outs = [
                [_address(builder, out, builder.mul(width, _int(row)), vector) for vector in range(_NUM_VECTORS)]
                for row in range(num_rows)
            ]
            sums = [_start(builder, out_at, shrink, vector, onto) for row in outs for vector, out_at in enumerate(row)]
            before, loop = builder.block, builder.append_basic_block("step")
            after = builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(ir.IntType(64))
            step.add_incoming(_int(0), before)
            running = [builder.phi(_LANES) for _ in sums]
            offset = builder.mul(step, width)
            rights = [builder.load(_address(builder, right, offset, vector), align=4) for vector in range(_NUM_VECTORS)]
            position = builder.mul(step, step_stride)
            results = []
            for row in range(num_rows):
                place = builder.add(position, builder.mul(row_stride, _int(row)))
                one = builder.load(_pointer(builder, left, place, ir.FloatType()), align=4)
                lanes = _spread(builder, one)
                for vector, factor in enumerate(rights):
                    product = builder.fmul(lanes, factor, flags=_FUSED)
                    results.append(builder.fadd(running[row * _NUM_VECTORS + vector], product, flags=_FUSED))
            for phi, start, result in zip(running, sums, results, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(result, loop)
            following = builder.add(step, _int(1))
            step.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            for at, result in zip((at for row in outs for at in row), results, strict=True):
                builder.store(result, at, align=4)
            return ir.Constant(ir.IntType(1), 0)

        return types.boolean(*[types.int64] * 8), emit

    return product


def _start(builder: ir.IRBuilder, out_at: ir.Value, shrink: ir.Value, vector: int, onto: bool) -> ir.Value:
    if not onto:
        return ir.Constant(_LANES, [0.0] * _NUM_LANES)
    return builder.fmul(builder.load(out_at, align=4), builder.load(_address(builder, shrink, _int(0), vector), align=4))


def _address(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, vector: int) -> ir.Value:
    """Where vector number `vector` after `offset` numbers begins."""
    return _pointer(builder, base, builder.add(offset, _int(vector * _NUM_LANES)), _LANES)


def _pointer(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(builder.add(base, builder.mul(offset, _int(4))), kind.as_pointer())


def _spread(builder: ir.IRBuilder, one: ir.Value) -> ir.Value:
    """A vector with the same number in all lanes."""
    first = builder.insert_element(ir.Constant(_LANES, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), _NUM_LANES), [0] * _NUM_LANES))


def _int(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


_score_rows = _product(_NUM_ROWS, onto=False)
_score_row = _product(1, onto=False)
_add_rows = _product(_NUM_ROWS, onto=True)
_add_row = _product(1, onto=True)


@inlined
def _turn_queries(
    q: Float, first_token: int, first_head: int, group: int, num_columns: int, scale: float, queries: Float
) -> None:
    """queries[i, column] = scale * number i of the column's query; what no query fills is zero."""
    queries[:, :] = _ZERO
    for column in range(num_columns):
        for i in range(queries.shape[0]):
            query = q[first_token + column // group, first_head + column % group, i]
            queries[i, column] = query * np.float32(scale)


@inlined
def _score(keys: Float, queries: Float, num_rows: int, scores: Float) -> None:
    """scores[row, column] = keys[row] . queries[:, column], for the first rows."""
    head_dim, width = queries.shape
    for panel in range(0, width, _PANEL):
        right, target = queries.ctypes.data + panel * 4, scores.ctypes.data + panel * 4
        row = 0
        while row + _NUM_ROWS <= num_rows:
            _score_rows(keys.ctypes.data + row * head_dim * 4, head_dim, 1, right, width, head_dim, 0, target + row * width * 4)
            row += _NUM_ROWS
        while row < num_rows:
            _score_row(keys.ctypes.data + row * head_dim * 4, head_dim, 1, right, width, head_dim, 0, target + row * width * 4)
            row += 1


@inlined
def _weigh(scores: Float, num_rows: int, highest: Float, total: Float, shrink: Float) -> None:
    """Scores become weights; `shrink` is what sums so far are worth under the new maximum."""
    width = scores.shape[1]
    shrink[:width] = highest[:width]
    for row in range(num_rows):
        for column in range(width):
            highest[column] = max(highest[column], scores[row, column])
    for column in range(width):
        shrink[column] = fast_exp(shrink[column] - highest[column])
        total[column] *= shrink[column]
    for row in range(num_rows):
        for column in range(width):
            score = scores[row, column]
            weight = fast_exp(score - highest[column]) if score > -np.inf else _ZERO
            scores[row, column] = weight
            total[column] += weight


@inlined
def _add_values(values: Float, weights: Float, num_rows: int, shrink: Float, sums: Float) -> None:
    """sums[i, column] = shrink[column] * sums[i, column] + sum over rows of values[row, i] * weights[row, column]."""
    head_dim, width = sums.shape
    for panel in range(0, width, _PANEL):
        right, factors = weights.ctypes.data + panel * 4, shrink.ctypes.data + panel * 4
        target = sums.ctypes.data + panel * 4
        i = 0
        while i + _NUM_ROWS <= head_dim:
            _add_rows(values.ctypes.data + i * 4, 1, head_dim, right, width, num_rows, factors, target + i * width * 4)
            i += _NUM_ROWS
        while i < head_dim:
            _add_row(values.ctypes.data + i * 4, 1, head_dim, right, width, num_rows, factors, target + i * width * 4)
            i += 1


@kernel(
    "void(float32[:,:,::1], float32[:,:,:,:,:,::1], int64, int32[::1], int64, float64, float32[:,:,::1], "
    "int64, int64, int64, int64)"
)
def _chunk_attention(
    q: Float,
    kv_pool: Float,
    layer: int,
    block_table: Ints,
    context_len: int,
    scale: float,
    out: Float,
    first_head: int,
    last_head: int,
    first_token: int,
    last_token: int,
) -> None:
    num_kv_heads, block_size, head_dim = kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5]
    group = q.shape[1] // num_kv_heads
    tile_tokens = max(1, _MAX_COLUMNS // group)
    max_width = (tile_tokens * group + _PANEL - 1) // _PANEL * _PANEL
    highest, total, shrink = np.empty(max_width, np.float32), np.empty(max_width, np.float32), np.empty(max_width, np.float32)
    for kv_head in range(first_head, last_head):
        for tile_start in range(first_token, last_token, tile_tokens):
            num_queries = min(tile_tokens, last_token - tile_start)
            num_columns = num_queries * group
            width = (num_columns + _PANEL - 1) // _PANEL * _PANEL
            queries, sums = np.empty((head_dim, width), np.float32), np.zeros((head_dim, width), np.float32)
            weights = np.empty((block_size, width), np.float32)
            _turn_queries(q, tile_start, kv_head * group, group, num_columns, scale, queries)
            total[:] = _ZERO
            highest[:] = -np.inf
            position = context_len - q.shape[0] + tile_start  # of the tile's first query
            end = position + num_queries
            for index in range((end + block_size - 1) // block_size):
                start = index * block_size
                num_rows = min(block_size, end - start)
                block = kv_pool[block_table[index], layer]
                _score(block[0, kv_head], queries, num_rows, weights)
                for row in range(max(0, position + 1 - start), num_rows):  # tokens that come after some of the queries
                    weights[row, : (start + row - position) * group] = -np.inf
                _weigh(weights, num_rows, highest, total, shrink)
                _add_values(block[1, kv_head], weights, num_rows, shrink, sums)
            for column in range(num_columns):
                inverse = _ONE / total[column]
                for i in range(head_dim):
                    out[tile_start + column // group, kv_head * group + column % group, i] = sums[i, column] * inverse
