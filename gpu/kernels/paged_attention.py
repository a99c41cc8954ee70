"""paged_attention: one query per sequence over the keys and values in that sequence's blocks.

One pass over the blocks with a running maximum and sum (online softmax: Milakov & Gimelshein 2018; over pages: vLLM's
PagedAttention, Kwon et al. 2023). The queries of a group share one pass over their KV head's blocks. A block holds all KV heads
of a layer side by side, so blocks are the outer loop and heads the inner one: memory is read in long runs, and while one tile
(the keys and values of one head in one block) is worked on, the next is on its way to the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature

from gpu.kernels.checks import check_layer, expect
from gpu.kernels.compiler import emitted, inlined, kernel
from gpu.kernels.fast_exp import fast_exp
from gpu.team import Team

Float = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_CACHE_LINE = 64
_WORTH_SHARING = 1 << 17  # tokens times query heads; less is done before another thread has woken up


def paged_attention(
    q: Float,
    kv_pool: Float,
    layer: int,
    block_tables: Ints,
    context_lens: Ints,
    scale: float,
    out: Float,
    team: Team | None = None,
) -> None:
    """out[s, h] = softmax(scale * q[s, h] . K) V over the first context_lens[s] tokens of sequence s.

    q, out: float32 [num_seqs, num_heads, head_dim], num_heads a multiple of num_kv_heads, query head h belonging to KV head
    h // (num_heads / num_kv_heads); kv_pool: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim];
    block_tables: int32 [num_seqs, max_blocks], entries beyond a sequence's context are not read; context_lens: int32 [num_seqs],
    0 gives a row of zeros. All contiguous. Sequences and KV heads are shared out over `team`; the result does not depend on it.
    Raises ValueError for shapes, IndexError for ids.
    """
    num_blocks, _, _, num_kv_heads, _, head_dim = kv_pool.shape
    num_seqs, num_heads, _ = q.shape
    expect(q, (num_seqs, num_heads, head_dim), "q")
    expect(out, q.shape, "out")
    expect(context_lens, (num_seqs,), "context_lens")
    check_layer(layer, kv_pool)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")
    if len(block_tables) != num_seqs:
        raise ValueError(f"{len(block_tables)} block tables for {num_seqs} sequences")

    def attend(first_seq: int, last_seq: int, first_head: int, last_head: int) -> int:
        return _paged_attention(
            q, kv_pool, layer, block_tables, context_lens, scale, out, first_seq, last_seq, first_head, last_head
        )

    if team is None or team.num_threads == 1 or int(context_lens.sum()) * num_heads < _WORTH_SHARING:
        bad = attend(0, num_seqs, 0, num_kv_heads)
    else:
        bad = max(team.run(attend, _parts(num_seqs, num_kv_heads, team.num_threads)))
    if bad >= 0:
        raise IndexError(f"sequence {bad}: its context or its block table reaches outside of the pool's {num_blocks} blocks")


def _parts(num_seqs: int, num_kv_heads: int, num_threads: int) -> list[tuple[int, int, int, int]]:
    """(first_seq, last_seq, first_head, last_head): several per thread, since contexts differ in length."""
    slices = min(num_kv_heads, max(1, -(-2 * num_threads // num_seqs))) if num_seqs > 1 else min(num_kv_heads, num_threads)
    cuts = [num_kv_heads * i // slices for i in range(slices + 1)]
    return [(seq, seq + 1, first, last) for seq in range(num_seqs) for first, last in pairwise(cuts)]


@emitted
def _fetch_line(_context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
    """Have the cache line at `address` brought to the second-level cache."""

    def emit(_target: Any, builder: ir.IRBuilder, _signature: Signature, args: tuple[ir.Value, ...]) -> ir.Value:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        operation = builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
        )
        read, second_level, data = (ir.Constant(number, value) for value in (0, 2, 1))
        builder.call(operation, (builder.inttoptr(args[0], pointer), read, second_level, data))
        return ir.Constant(ir.IntType(1), 0)

    return types.boolean(types.int64), emit


@inlined
def _fetch_rows(tile: int, row: int, head_dim: int) -> None:
    """Four rows of a tile that is worked on next."""
    for at in range(tile + row * head_dim * 4, tile + (row + 4) * head_dim * 4, _CACHE_LINE):
        _fetch_line(at)


@inlined
def _score(query: Float, keys: Float, num_rows: int, scale: np.float32, scores: Float, next_tile: int) -> None:
    """scores[row] = scale * query . keys[row], four rows at a time so that `query` is loaded once for them."""
    head_dim = query.shape[0]
    row = 0
    while row + 4 <= num_rows:
        key0, key1, key2, key3 = keys[row], keys[row + 1], keys[row + 2], keys[row + 3]
        sum0, sum1, sum2, sum3 = _ZERO, _ZERO, _ZERO, _ZERO
        for i in range(head_dim):
            sum0 += query[i] * key0[i]
            sum1 += query[i] * key1[i]
            sum2 += query[i] * key2[i]
            sum3 += query[i] * key3[i]
        scores[row], scores[row + 1] = sum0 * scale, sum1 * scale
        scores[row + 2], scores[row + 3] = sum2 * scale, sum3 * scale
        if next_tile:
            _fetch_rows(next_tile, row, head_dim)
        row += 4
    while row < num_rows:
        key0 = keys[row]
        sum0 = _ZERO
        for i in range(head_dim):
            sum0 += query[i] * key0[i]
        scores[row] = sum0 * scale
        row += 1


@inlined
def _add_values(weights: Float, values: Float, num_rows: int, sums: Float, next_tile: int) -> None:
    """sums += weights[row] * values[row] over the rows, four at a time so that `sums` is loaded and stored once for them."""
    head_dim = sums.shape[0]
    row = 0
    while row + 4 <= num_rows:
        value0, value1, value2, value3 = values[row], values[row + 1], values[row + 2], values[row + 3]
        weight0, weight1, weight2, weight3 = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
        for i in range(head_dim):
            sums[i] += weight0 * value0[i] + weight1 * value1[i] + weight2 * value2[i] + weight3 * value3[i]
        if next_tile:
            _fetch_rows(next_tile, row, head_dim)
        row += 4
    while row < num_rows:
        value0, weight0 = values[row], weights[row]
        for i in range(head_dim):
            sums[i] += weight0 * value0[i]
        row += 1


@kernel(
    "int64(float32[:,:,::1], float32[:,:,:,:,:,::1], int64, int32[:,::1], int32[::1], float64, float32[:,:,::1], "
    "int64, int64, int64, int64)"
)
def _paged_attention(
    q: Float,
    kv_pool: Float,
    layer: int,
    block_tables: Ints,
    context_lens: Ints,
    scale: float,
    out: Float,
    first_seq: int,
    last_seq: int,
    first_head: int,
    last_head: int,
) -> int:
    num_blocks, num_kv_heads, block_size, head_dim = kv_pool.shape[0], kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5]
    group = q.shape[1] // num_kv_heads
    weights = np.empty(block_size, np.float32)
    highest = np.empty(q.shape[1], np.float32)
    total = np.empty(q.shape[1], np.float32)
    tile_bytes = block_size * head_dim * 4
    for seq in range(first_seq, last_seq):
        context_len = context_lens[seq]
        used = (context_len + block_size - 1) // block_size
        if context_len < 0 or used > block_tables.shape[1]:
            return seq
        for index in range(used):
            if block_tables[seq, index] < 0 or block_tables[seq, index] >= num_blocks:
                return seq
        highest[:] = -np.inf
        total[:] = _ZERO
        out[seq, first_head * group : last_head * group] = _ZERO
        for index in range(used):
            num_rows = min(block_size, context_len - index * block_size)
            block = kv_pool[block_tables[seq, index], layer]
            following = kv_pool[block_tables[seq, min(index + 1, used - 1)], layer]
            for kv_head in range(first_head, last_head):
                keys, values = block[0, kv_head], block[1, kv_head]
                next_tile = block.ctypes.data + (kv_head + 1) * tile_bytes
                if kv_head + 1 == last_head:
                    next_tile = following.ctypes.data + first_head * tile_bytes
                for head in range(kv_head * group, (kv_head + 1) * group):
                    sums = out[seq, head]
                    _score(q[seq, head], keys, num_rows, np.float32(scale), weights, next_tile)
                    top = highest[head]
                    for row in range(num_rows):
                        top = max(top, weights[row])
                    shrink = fast_exp(highest[head] - top)
                    highest[head] = top
                    weight_sum = _ZERO
                    for row in range(num_rows):
                        weight = fast_exp(weights[row] - top)
                        weights[row] = weight
                        weight_sum += weight
                    total[head] = total[head] * shrink + weight_sum
                    if shrink != _ONE:
                        for i in range(head_dim):
                            sums[i] *= shrink
                    _add_values(weights, values, num_rows, sums, next_tile + num_kv_heads * tile_bytes if next_tile else 0)
                    next_tile = 0  # fetched by the first head of the group
        for head in range(first_head * group, last_head * group):
            if total[head] > _ZERO:
                inverse = _ONE / total[head]
                for i in range(head_dim):
                    out[seq, head, i] *= inverse
    return -1
