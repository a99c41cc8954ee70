"""The attention kernels beside gathering keys and values and torch's scaled_dot_product_attention, on the same threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu.kernels import chunk_attention, gather_kv, paged_attention
from gpu.team import Team
from tools.bench.handoff import gather_figures
from tools.bench.rows import Row, make_row, render

_BLOCK_SIZE = 16
_ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Case:
    """`num_queries` last tokens of a context, for heads of Qwen3-0.6B: one is a decode step, more are a prompt's chunk."""

    num_queries: int
    context_len: int
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128


CASES = (Case(1, 1024), Case(1, 4096), Case(1, 8192), Case(16, 1024), Case(256, 1024), Case(1024, 1024), Case(256, 4096))


def run() -> list[Row]:
    """Measure; takes about 30 s."""
    rows = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        team = Team(num_threads)
        rows += [_row(case, team) for case in CASES]
        team.close()
    return rows


def _row(case: Case, team: Team) -> Row:
    kind = "decode" if case.num_queries == 1 else f"chunk of {case.num_queries}"
    ours, theirs = _works(case, team)
    seconds = gather_figures(_ROUNDS, {"ours": ours, "theirs": theirs})
    name = f"{kind}, context {case.context_len}, {team.num_threads} thread{'s' * (team.num_threads > 1)}"
    return make_row(name, 1e3 * seconds["ours"], "ms", baseline=1e3 * seconds["theirs"], bar="<1")


def _works(case: Case, team: Team) -> tuple[Callable[[], None], Callable[[], None]]:
    rng = np.random.default_rng(0)
    n, heads, kv_heads, dim, length = case.num_queries, case.num_heads, case.num_kv_heads, case.head_dim, case.context_len
    num_blocks = length // _BLOCK_SIZE
    pool = rng.standard_normal((num_blocks, 2, 2, kv_heads, _BLOCK_SIZE, dim), dtype=np.float32)
    table = rng.permutation(num_blocks).astype(np.int32)
    q = rng.standard_normal((n, heads, dim), dtype=np.float32)
    out, scale = np.empty_like(q), dim**-0.5
    lens = np.array([length], np.int32)
    keys, values = torch.empty(kv_heads, length, dim), torch.empty(kv_heads, length, dim)
    queries = torch.from_numpy(q).view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    shape = (kv_heads, heads // kv_heads, length, dim)

    def ours() -> None:
        if n == 1:
            paged_attention(q, pool, 1, table[None], lens, scale, out, team)
        else:
            chunk_attention(q, pool, 1, table, length, scale, out, team)

    def theirs() -> None:
        gather_kv(pool, 1, table, length, keys.numpy(), values.numpy())
        if n == 1:  # the heads of a group as the queries of one head: nothing is expanded
            scaled_dot_product_attention(queries.view(1, kv_heads, -1, dim), keys[None], values[None], scale=scale)
            return
        k, v = keys[:, None].expand(shape), values[:, None].expand(shape)
        if n == length:
            scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale)
        else:
            mask = torch.ones(n, length, dtype=torch.bool).tril_(length - n)
            scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)

    return ours, theirs


if __name__ == "__main__":
    print(render(run()))
