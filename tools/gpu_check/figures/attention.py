"""Attention alone, by every set of kernels that there is: decode over paged KV, and a prompt's chunk by both ways."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.counts import chunk_attention_flop, layer_kv_bytes
from tools.gpu_check.figures.decode import short
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits, Missing

WAYS = {"numba": "gather + SDPA"}  # what a set's chunk_attention is, where it is not a kernel of its own


def run(rig: Rig) -> Figures:
    limits = rig.known_limits()
    for kernels in _sets(rig):
        if isinstance(kernels, Missing):
            yield kernels
            continue
        is_chosen = kernels.name == rig.backend.kernels.name
        try:
            kernels.warm_up(rig.model().geometry(rig.block_size), rig.device)
            yield _paged(rig, kernels, limits, is_chosen=is_chosen)
            for num_tokens in chunk_sizes(rig):
                yield _chunk(rig, kernels, num_tokens, limits)
        except Exception as error:  # one set that fails says nothing of the next, unless the device is lost: then that fails, too
            yield Missing(f"attention alone: {kernels.name}", f"{type(error).__name__}: {error}")


def chunk_sizes(rig: Rig) -> list[int]:
    """Of a prompt: as the server cuts it, and whole."""
    whole = rig.loads.prefill_tokens
    return sorted({min(rig.server.max_chunk_tokens, whole), whole})


def _sets(rig: Rig) -> Iterator[Kernels | Missing]:
    """The backend's own first."""
    yield rig.backend.kernels
    for name, choose in rig.sets.items():
        if name == rig.backend.kernels.name:
            continue
        try:
            yield choose()
        except Exception as error:  # not installed, or of another version than it was written for
            yield Missing(f"attention alone: {name}", f"{type(error).__name__}: {error}")


def _paged(rig: Rig, kernels: Kernels, limits: Limits, *, is_chosen: bool) -> Row:
    """Each round over another layer; sequences' blocks in no order."""
    text, (batch, context) = rig.config.text, rig.loads.attention
    pool = _pool_of(rig.kv_blocks(), batch * rig.num_blocks_of(context))
    batch = min(batch, len(pool) // rig.num_blocks_of(context))
    each = rig.num_blocks_of(context)
    tables = torch.randperm(len(pool), device=rig.device)[: batch * each].view(batch, each).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=rig.device)
    q = torch.randn(batch, text.num_heads, text.head_dim, device=rig.device).to(rig.dtype)
    out = torch.empty_like(q)
    num_floats = kernels.workspace_floats(batch, text.num_heads, text.num_kv_heads, text.head_dim)
    workspace = torch.empty(num_floats, device=rig.device)
    rounds, scale = count(), text.head_dim**-0.5

    def attend() -> None:
        kernels.paged_attention(q, pool, next(rounds) % pool.shape[1], tables, lens, scale, out, workspace)

    seconds = rig.timer.median_s(attend, rounds=2 * rig.loads.rounds)
    num_bytes = batch * context * layer_kv_bytes(text, rig.dtype.itemsize)
    reached = num_bytes / seconds
    return make_row(
        f"paged decode attention, batch {batch}, context {short(context)}: {kernels.name}",
        reached / 1e9,
        "GB/s",
        baseline=limits.copy_bytes_per_s / 1e9,
        bar=">=0.7" if is_chosen else "",
        note=f"{num_bytes / 1e9:.2f} GB of keys and values of one layer in {1e6 * seconds:.0f} us; "
        f"{reached / limits.read_bytes_per_s:.0%} of what the device only reads" + ("" if is_chosen else "; not the chosen set"),
    )


def _chunk(rig: Rig, kernels: Kernels, num_tokens: int, limits: Limits) -> Row:
    """The last tokens of the longest prompt."""
    text, context = rig.config.text, rig.loads.prefill_tokens
    pool = rig.kv_blocks()
    table = torch.randperm(len(pool), device=rig.device)[: rig.num_blocks_of(context)].int()
    q = torch.randn(num_tokens, text.num_heads, text.head_dim, device=rig.device).to(rig.dtype)
    out, rounds, scale = torch.empty_like(q), count(), text.head_dim**-0.5

    def attend() -> None:
        kernels.chunk_attention(q, pool, next(rounds) % text.num_layers, table, context, scale, out)

    seconds = rig.timer.median_s(attend, rounds=rig.loads.rounds)
    reached = chunk_attention_flop(text, num_tokens, context) / seconds
    way = WAYS.get(kernels.name, "chunk_attention")
    return make_row(
        f"attention of the last {short(num_tokens)} of {short(context)} tokens: {way} ({kernels.name})",
        reached / 1e12,
        "TFLOP/s",
        baseline=limits.flop_per_s / 1e12,
        note=f"one layer, {1e6 * seconds:.0f} us",
    )


def _pool_of(blocks: Tensor, num_blocks: int) -> Tensor:
    """The same memory as a pool of more blocks of fewer layers, if it takes that to have so many."""
    layers = blocks.shape[1]
    for parts in range(1, layers + 1):
        if layers % parts == 0 and len(blocks) * parts >= num_blocks:
            return blocks.view(len(blocks) * parts, layers // parts, *blocks.shape[2:])
    return blocks.view(len(blocks) * layers, 1, *blocks.shape[2:])
