"""paged_attention: one query per sequence over the keys and values in that sequence's blocks.

One thread block per (sequence, KV head, split of the context): the queries of a group share one pass over their KV head's tokens
(PagedAttention, Kwon et al. 2023; Flash-Decoding, Dao et al. 2023). In it, teams of neighbouring threads. A team holds the
group's queries, each of its threads a part of the head. It takes every n-th tile, a few tokens of one block, with running maxima
and sums of its own (Milakov & Gimelshein 2018), so teams meet only at the end. A tile goes through three steps:

- scores: each thread multiplies its part of the head, and the team adds up such that every thread ends with the scores that it
  will turn into weights, all of one head (a butterfly that halves what each holds at every step);
- weights: exp2(score - top). The top follows the maximum only when that has grown by a factor of 2^8, as in FlashAttention-4:
  until then no sum needs to shrink, and float32 has room for the larger weights;
- sums: each thread adds up the weighted values of its part of the head, the weights handed out by those who have them.

The next tile's keys are on their way while this tile's scores become weights and sums, and its values during the next scores.

With several splits each leaves its sums in the workspace, for `merge_splits`. How many splits there are the host decides from the
number of sequences alone, so that a captured graph serves any context; where they are cut is decided on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_paged_attention
from gpu.cuda.kernels.device import (
    SIMULATED,
    WARP,
    address,
    device,
    exp2,
    lane_get,
    lane_max,
    lane_sum,
    lane_swap,
    load_i32,
    load_words,
    packing,
    reciprocal,
    store_f32,
    store_words,
    warp_any,
)
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.merge_splits import LOWEST, merge_splits, split_length
from gpu.cuda.kernels.shapes import ceil_pow2, log2, units_per_row

_THREADS = WARP if SIMULATED else 128
_NUMBERS = 32  # of a group's queries that a thread holds, if enough threads can share them; as many of its sums
_TILE_UNITS = 4  # of keys that a thread has on their way at a time, and of values
_FEW_REGISTERS = 128  # per thread: sixteen warps fit a multiprocessor, enough to hide memory
_MAX_GROUP = 8
_MAX_SPLITS = 64
_THREAD_BLOCKS = 12 if SIMULATED else 2048  # that there should be: several times what runs at once on the largest devices
_ZERO = np.float32(0.0)
_HEADROOM = np.float32(8.0)
_LOG2E = 1.4426950408889634


def paged_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """`Kernels.paged_attention`. D and block_size are powers of two, D is whole units of 16 bytes."""
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_seqs, num_heads, _ = q.shape
    floats = workspace_floats(num_seqs, num_heads, num_kv_heads, head_dim)
    check_paged_attention(q, kv_pool, layer, block_tables, context_lens, out, workspace, floats)
    plan = _plan(kv_pool.dtype, head_dim, num_heads // num_kv_heads, log2(block_size, "block_size"))
    num_splits = _num_splits(num_seqs, num_kv_heads)
    max_tokens = block_tables.shape[1] * block_size
    _kernel(plan, num_splits > 1).launch(
        (num_splits, num_kv_heads * plan.num_parts, num_seqs),
        q.device,
        units(q),
        units(kv_pool),
        num_blocks,
        num_layers * 2 * num_kv_heads,
        layer * 2 * num_kv_heads,
        num_kv_heads,
        address(block_tables),
        block_tables.stride(0),
        address(context_lens),
        max_tokens,
        np.float32(scale * _LOG2E),
        units(workspace if num_splits > 1 else out),
    )
    if num_splits > 1:
        merge_splits(workspace, context_lens, max_tokens, num_splits, out)


def workspace_floats(max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """`Kernels.workspace_floats`."""
    most = min(max_seqs * _MAX_SPLITS, max_seqs + -(-_THREAD_BLOCKS // num_kv_heads))  # sequences times splits
    return most * num_heads * (head_dim + 2)


def _num_splits(num_seqs: int, num_kv_heads: int) -> int:
    return min(_MAX_SPLITS, -(-_THREAD_BLOCKS // max(1, num_seqs * num_kv_heads)))


@dataclass(frozen=True)
class _Plan:
    """Who works on what; what a kernel is compiled for."""

    dtype: torch.dtype
    head_dim: int
    group: int  # heads of a thread block
    num_parts: int  # thread blocks that share a KV head's queries, because they are too many for a team
    block_shift: int
    num_lanes: int  # of a team
    tile_tokens: int


@cache
def _plan(dtype: torch.dtype, head_dim: int, group: int, block_shift: int) -> _Plan:
    head_units = units_per_row(head_dim, dtype, "a head")
    log2(head_units, "a head in units")
    most = min(head_units, WARP, _MAX_GROUP)
    num_parts = next(parts for parts in range(1, group + 1) if group % parts == 0 and group // parts <= most)
    group //= num_parts
    num_lanes = min(max(4, ceil_pow2(group), ceil_pow2(-(-group * head_dim // _NUMBERS))), head_units, WARP)
    tile_tokens = max(1, _TILE_UNITS * num_lanes // head_units)
    return _Plan(dtype, head_dim, group, num_parts, block_shift, num_lanes, tile_tokens)


@cache
def _kernel(plan: _Plan, is_split: bool) -> Kernel:
    width, unpack, pack = packing(plan.dtype)
    _, _, pack_f32 = packing(torch.float32)
    group, head_dim, shift, lanes, tile = plan.group, plan.head_dim, plan.block_shift, plan.num_lanes, plan.tile_tokens
    num_parts = plan.num_parts
    teams = _THREADS // lanes
    head_units = head_dim // width
    block_units = head_units << shift
    chunks = head_units // lanes  # units of a head that a thread holds
    chunk_numbers = chunks * width
    numbers, tile_units = group * chunk_numbers, tile * chunks
    group_numbers = group * head_dim
    marks, team_numbers = teams * group, teams * group_numbers
    quads = width // 4  # units of float32 that a unit becomes
    step = tile * teams  # tokens
    # A tile's scores are [ceil_pow2(group), tile]; a team's threads hold them in this order, `held` each or `copies` of each.
    tile_scores = ceil_pow2(group) * tile
    held, copies = max(1, tile_scores // lanes), max(1, lanes // tile_scores)
    head_lanes = lanes // ceil_pow2(group)
    reduce = _reduction(tile_scores, lanes)

    @device
    def look_up(tables: Any, table: Any, token: Any, last: Any) -> Any:
        """The block of a tile, or of the last token if the tile lies beyond that."""
        return load_i32(tables, table + (min(token, last - 1) >> shift))

    @device
    def locate(block: Any, token: Any, num_blocks: Any, block_planes: Any, plane: Any) -> Any:
        """Where the tile's keys begin, in units."""
        inside = min(max(np.int64(block), 0), num_blocks - 1)
        return (inside * block_planes + plane) * block_units + (token & ((1 << shift) - 1)) * head_units

    @device
    def fetch(words: Any, kv_pool: Any, run: Any) -> None:
        for i in range(tile):
            for c in range(chunks):
                found = load_words(kv_pool, run + i * head_units + c * lanes)
                for w in range(4):
                    words[i * chunks + c, w] = found[w]

    @device
    def forget(words: Any, token: Any, last: Any) -> None:
        """What lies in a block beyond the context may be no number, and stay none however little weight it gets."""
        for i in range(tile):
            if token + i >= last:
                for c in range(chunks):
                    for w in range(4):
                        words[i * chunks + c, w] = 0

    @device
    def score(scores: Any, words: Any, queries: Any, key: Any, lane: Any) -> None:
        for i in range(tile_scores):
            scores[i] = _ZERO
        for i in range(tile):
            for c in range(chunks):
                u = i * chunks + c
                unpack((words[u, 0], words[u, 1], words[u, 2], words[u, 3]), key, 0)
                for g in range(group):
                    for j in range(width):
                        scores[g * tile + i] += queries[g * chunk_numbers + c * width + j] * key[j]
        reduce(scores, lane)

    @device
    def weigh(weights: Any, token: Any, last: Any, top: Any, total: Any, sums: Any, thread: Any) -> Any:
        """Scores to weights, in place; the new top and total of this thread's head."""
        lane = thread % lanes
        first = lane * held // copies % tile  # of the tile's tokens
        highest = LOWEST
        for i in range(held):
            if token + first + i < last:
                highest = max(highest, weights[i])
        highest = lane_max(highest, head_lanes)
        grows = highest > top + _HEADROOM
        if warp_any(grows):
            shrink = exp2(top - highest) if grows else np.float32(1.0)
            top = highest if grows else top
            total *= shrink
            for g in range(group):
                of_head = lane_get(shrink, thread % WARP - lane + g * head_lanes)
                for j in range(chunk_numbers):
                    sums[g * chunk_numbers + j] *= of_head
        for i in range(held):
            weights[i] = exp2(weights[i] - top) if token + first + i < last else _ZERO
            total += weights[i]
        return top, total

    @device
    def add_up(sums: Any, words: Any, weights: Any, value: Any, thread: Any) -> None:
        team_place = thread % WARP - thread % lanes
        handed = cuda.local.array(group, np.float32)
        for i in range(tile):
            for g in range(group):
                handed[g] = lane_get(weights[(g * tile + i) % held], team_place + (g * tile + i) // held * copies)
            for c in range(chunks):
                u = i * chunks + c
                unpack((words[u, 0], words[u, 1], words[u, 2], words[u, 3]), value, 0)
                for g in range(group):
                    for j in range(width):
                        sums[g * chunk_numbers + c * width + j] += handed[g] * value[j]

    def paged_attention_kernel(
        q: Any,
        kv_pool: Any,
        num_blocks: int,
        block_planes: int,
        layer_plane: int,
        num_kv_heads: int,
        tables: Any,
        table_stride: int,
        context_lens: Any,
        max_tokens: int,
        scale: Any,
        out: Any,
    ) -> None:
        split, part, seq = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        num_splits, num_seqs = cuda.gridDim.x, cuda.gridDim.z
        thread = cuda.threadIdx.x
        lane, team = thread % lanes, thread // lanes
        first_head = (seq * cuda.gridDim.y + part) * group
        last = min(load_i32(context_lens, seq), max_tokens)
        start = 0
        if is_split:
            length = split_length(last, num_splits)
            start = split * length
            last = min(start + length, last)
        sums = cuda.local.array(numbers, np.float32)
        unpacked = cuda.local.array(width, np.float32)
        top, total = LOWEST, _ZERO  # of the head whose scores this thread turns into weights
        for i in range(numbers):
            sums[i] = _ZERO

        if start < last:  # otherwise there is nothing: a row of padding, or a split beyond the context
            queries = cuda.local.array(numbers, np.float32)
            keys = cuda.local.array((tile_units, 4), np.uint32)
            values = cuda.local.array((tile_units, 4), np.uint32)
            scores = cuda.local.array(tile_scores, np.float32)
            table = seq * table_stride
            plane = layer_plane + part // num_parts
            token = start + team * tile
            block = look_up(tables, table, token, last)
            run = locate(block, token, num_blocks, block_planes, plane) + lane
            block = look_up(tables, table, token + step, last)
            fetch(keys, kv_pool, run)
            fetch(values, kv_pool, run + num_kv_heads * block_units)
            for g in range(group):
                for c in range(chunks):
                    unpack(load_words(q, (first_head + g) * head_units + c * lanes + lane), queries, (g * chunks + c) * width)
            for i in range(numbers):
                queries[i] *= scale
            while start < last:
                score(scores, keys, queries, unpacked, lane)
                start += step
                if start < last:
                    run = locate(block, token + step, num_blocks, block_planes, plane) + lane
                    block = look_up(tables, table, token + 2 * step, last)
                    fetch(keys, kv_pool, run)
                if start > last:
                    forget(values, token, last)
                top, total = weigh(scores, token, last, top, total, sums, thread)
                add_up(sums, values, scores, unpacked, thread)
                if start < last:
                    fetch(values, kv_pool, run + num_kv_heads * block_units)
                token += step

        team_tops = cuda.shared.array(marks, np.float32)
        team_totals = cuda.shared.array(marks, np.float32)
        team_sums = cuda.shared.array(team_numbers, np.float32)
        total = lane_sum(total, head_lanes)
        if lane % head_lanes == 0 and lane < group * head_lanes:
            team_tops[team * group + lane // head_lanes] = top
            team_totals[team * group + lane // head_lanes] = total / np.float32(copies)
        cuda.syncthreads()
        for g in range(group):
            top = LOWEST
            for t in range(teams):
                top = max(top, team_tops[t * group + g])
            shrink = exp2(team_tops[team * group + g] - top)
            for j in range(chunk_numbers):  # neighbours write side by side
                team_sums[(team * group + g) * head_dim + j * lanes + lane] = sums[g * chunk_numbers + j] * shrink
            if lane == 0:
                team_totals[team * group + g] *= shrink
        cuda.syncthreads()
        for i in range(thread, group_numbers, _THREADS):
            gathered = team_sums[i]
            for t in range(1, teams):
                gathered += team_sums[t * group_numbers + i]
            team_sums[i] = gathered
        cuda.syncthreads()
        for unit in range(thread, group * head_units, _THREADS):
            g, chunk = unit // head_units, unit % head_units // lanes
            top, total = LOWEST, _ZERO
            for t in range(teams):
                top = max(top, team_tops[t * group + g])
                total += team_totals[t * group + g]
            for j in range(width):
                unpacked[j] = team_sums[g * head_dim + (chunk * width + j) * lanes + unit % lanes]
            if is_split:
                row = (first_head + g) * num_splits + split
                for i in range(quads):
                    store_words(out, (row * head_units + unit % head_units) * quads + i, pack_f32(unpacked, 4 * i))
                if unit % head_units == 0:
                    beyond = num_seqs * cuda.gridDim.y * group * num_splits * head_dim
                    store_f32(out, beyond + 2 * row, top)
                    store_f32(out, beyond + 2 * row + 1, total)
            else:
                factor = reciprocal(total) if total > _ZERO else _ZERO
                for j in range(width):
                    unpacked[j] *= factor
                store_words(out, first_head * head_units + unit, pack(unpacked, 0))

    arguments = "int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, float32, int64"
    fits = numbers <= _NUMBERS and held == 1
    return Kernel(paged_attention_kernel, arguments, _THREADS, max_registers=_FEW_REGISTERS if fits else None)


def _reduction(count: int, lanes: int) -> Callable[..., None]:
    """A function (values, lane) for kernels: adds up `count` values over `lanes` threads, each ending with its share.

    That is max(1, count / lanes) sums, in order; where there are more threads than values, neighbours hold the same one.
    """
    if lanes == 1:
        return _nothing
    step = lanes // 2
    half = count // 2
    rest = _reduction(max(1, half), step)

    @device
    def halve(values: Any, lane: Any) -> None:
        is_upper = lane & step != 0
        for i in range(half):
            low, high = values[i], values[i + half]
            values[i] = (high if is_upper else low) + lane_swap(low if is_upper else high, step)
        if half == 0:
            values[0] += lane_swap(values[0], step)
        rest(values, lane)

    return halve


@device
def _nothing(values: Any, lane: Any) -> None:
    pass
