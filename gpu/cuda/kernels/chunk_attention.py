"""chunk_attention: the queries of a prompt's chunk over all of their sequence, as a gather and torch's own attention.

Attention over thousands of queries is matrix products, and those belong on tensor cores, which Numba does not reach: keys and
values are gathered out of their blocks (each is read and written once, little beside the products), and torch's flash or
memory-efficient kernel (Dao et al. 2023) does the rest. Both know a causal mask whose last row sees everything and need no
tensor for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from gpu.cuda.kernels import Chunks
from gpu.cuda.kernels.checks import check_chunk_attention, check_varlen_chunk_attention
from gpu.cuda.kernels.gather_kv import gather_kv


def varlen_chunk_attention(q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor) -> None:
    """`Kernels.varlen_chunk_attention`, one after the other. Heads as in `gather_kv`."""
    check_varlen_chunk_attention(q, kv_pool, layer, chunks, out)
    for queries, block_table, context_len, attended in chunks.one_by_one(q, out):
        chunk_attention(queries, kv_pool, layer, block_table, context_len, scale, attended)


def chunk_attention(
    q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, out: Tensor
) -> None:
    """`Kernels.chunk_attention`. Heads as in `gather_kv`."""
    check_chunk_attention(q, kv_pool, layer, block_table, context_len, out)
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = kv_pool.shape[3]
    if num_queries == 0:
        return
    k, v = torch.empty((2, num_kv_heads, context_len, head_dim), dtype=q.dtype, device=q.device)
    gather_kv(kv_pool, layer, block_table, context_len, k, v)
    found = scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, num_heads, num_queries, head_dim]
        k[None],
        v[None],
        attn_mask=causal_lower_right(num_queries, context_len),
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    out.copy_(found[0].transpose(0, 1))
