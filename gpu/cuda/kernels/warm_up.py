"""Every kernel of a set once, on next to nothing: what is compiled and loaded then need not be under a captured graph."""

from __future__ import annotations

import torch

from gpu.cuda.kernels import Geometry, Kernels

_BATCHES = (1, 4096)  # sequences; paged_attention has other kernels for few than for many


def run_all(kernels: Kernels, geometry: Geometry, device: torch.device) -> None:
    """Blocks until the device is done. Takes a few megabytes while it runs."""
    g = geometry

    def zeros(*shape: int, dtype: torch.dtype = g.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x, weight, gate_up = zeros(1, g.hidden_size), zeros(g.hidden_size), zeros(1, 2 * g.intermediate_size)
    kernels.rms_norm(x, weight, 1.0, x)
    kernels.add_rms_norm(zeros(1, g.hidden_size), x, weight, 1.0, x)
    kernels.silu_mul(gate_up, zeros(1, g.intermediate_size))

    pool = zeros(1, 1, 2, g.num_kv_heads, g.block_size, g.head_dim)
    qkv, q = zeros(1, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim), zeros(1, g.num_heads, g.head_dim)
    norm = zeros(g.head_dim) if g.has_qk_norm else None
    angles, slots = zeros(1, g.head_dim // 2, dtype=torch.float32), zeros(1, dtype=torch.int64)
    kernels.rope_store(qkv, norm, norm, 1.0, angles, angles, pool, 0, slots, q)
    for batch in _BATCHES:
        queries, table = zeros(batch, g.num_heads, g.head_dim), zeros(batch, 1, dtype=torch.int32)
        workspace = zeros(kernels.workspace_floats(batch, g.num_heads, g.num_kv_heads, g.head_dim), dtype=torch.float32)
        lens = zeros(batch, dtype=torch.int32)
        lens[0] = 1
        kernels.paged_attention(queries, pool, 0, table, lens, 1.0, queries.clone(), workspace)
    table = zeros(1, dtype=torch.int32)
    for context_len in (1, 2):  # a chunk that is all of its context, and one that is not
        kernels.chunk_attention(q, pool, 0, table, context_len, 1.0, q.clone())
    dense = zeros(2, g.num_kv_heads, 1, g.head_dim)
    kernels.gather_kv(pool, 0, table, 1, dense[0], dense[1])

    blocks = pool.view(torch.uint8).view(1, -1)
    ids, sums = zeros(1, dtype=torch.int64), zeros(1, dtype=torch.int64)
    copies = torch.empty_like(blocks)
    kernels.copy_blocks(blocks, ids, copies, ids, sums)
    kernels.copy_blocks(blocks, ids, copies, ids, None)
    kernels.hash_blocks(blocks, ids, sums)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
