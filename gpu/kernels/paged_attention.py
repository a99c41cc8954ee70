"""paged_attention: one query per sequence over the keys and values in that sequence's blocks.

One pass over the blocks with a running maximum and sum (online softmax: Milakov & Gimelshein 2018; over pages: vLLM's
PagedAttention, Kwon et al. 2023). The queries of a group share one pass over their KV head's blocks.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_layer, expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def paged_attention(
    q: Float, kv_pool: Float, layer: int, block_tables: Ints, context_lens: Ints, scale: float, out: Float
) -> None:
    """out[s, h] = softmax(scale * q[s, h] . K) V over the first context_lens[s] tokens of sequence s.

    q, out: float32 [num_seqs, num_heads, head_dim], num_heads a multiple of num_kv_heads, query head h belonging to KV head
    h // (num_heads / num_kv_heads); kv_pool: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim];
    block_tables: int32 [num_seqs, max_blocks], entries beyond a sequence's context are not read; context_lens: int32 [num_seqs],
    0 gives a row of zeros. All contiguous. Raises ValueError for shapes, IndexError for ids.
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
    bad = _paged_attention(q, kv_pool, layer, block_tables, context_lens, scale, out, 0, num_seqs * num_kv_heads)
    if bad >= 0:
        raise IndexError(f"sequence {bad}: its context or its block table reaches outside of the pool's {num_blocks} blocks")


@kernel(
    "int64(float32[:,:,::1], float32[:,:,:,:,:,::1], int64, int32[:,::1], int32[::1], float64, float32[:,:,::1], int64, int64)"
)
def _paged_attention(
    q: Float, kv_pool: Float, layer: int, block_tables: Ints, context_lens: Ints, scale: float, out: Float, first: int, last: int
) -> int:
    num_blocks, num_kv_heads, block_size, head_dim = kv_pool.shape[0], kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5]
    group = q.shape[1] // num_kv_heads
    weights = np.empty((group, block_size), np.float32)
    highest = np.empty(group, np.float32)
    total = np.empty(group, np.float32)
    factor = np.float32(scale)
    for item in range(first, last):
        seq: int = item // num_kv_heads
        kv_head = item - seq * num_kv_heads
        context_len = context_lens[seq]
        used = (context_len + block_size - 1) // block_size
        if context_len < 0 or used > block_tables.shape[1]:
            return seq
        for index in range(used):
            if block_tables[seq, index] < 0 or block_tables[seq, index] >= num_blocks:
                return seq
        queries = q[seq, kv_head * group : (kv_head + 1) * group]
        sums = out[seq, kv_head * group : (kv_head + 1) * group]
        sums[:, :] = 0.0
        highest[:] = -np.inf
        total[:] = 0.0
        for index in range(used):
            num_rows = min(block_size, context_len - index * block_size)
            keys = kv_pool[block_tables[seq, index], layer, 0, kv_head]
            values = kv_pool[block_tables[seq, index], layer, 1, kv_head]
            for head in range(group):
                top = highest[head]
                for row in range(num_rows):
                    score = np.float32(0.0)
                    for i in range(head_dim):
                        score += queries[head, i] * keys[row, i]
                    score *= factor
                    weights[head, row] = score
                    top = max(top, score)
                shrink = np.float32(math.exp(highest[head] - top))
                highest[head] = top
                weight_sum = total[head] * shrink
                for row in range(num_rows):
                    weight = np.float32(math.exp(weights[head, row] - top))
                    weights[head, row] = weight
                    weight_sum += weight
                total[head] = weight_sum
                if shrink != np.float32(1.0):
                    for i in range(head_dim):
                        sums[head, i] *= shrink
                for row in range(num_rows):
                    weight = weights[head, row]
                    for i in range(head_dim):
                        sums[head, i] += weight * values[row, i]
        for head in range(group):
            if total[head] > np.float32(0.0):
                inverse = np.float32(1.0) / total[head]
                for i in range(head_dim):
                    sums[head, i] *= inverse
    return -1
