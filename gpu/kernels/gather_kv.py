"""gather_kv: one sequence's keys and values of one layer, from its blocks into rows, as a dense attention wants them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_block_ids, check_layer, expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]


def gather_kv(
    kv_pool: Float, layer: int, block_table: npt.NDArray[np.int32], num_tokens: int, k_out: Float, v_out: Float
) -> None:
    """Copy the first `num_tokens` tokens of the sequence whose blocks are `block_table`.

    kv_pool: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; block_table: int32 [>= ceil(num_tokens /
    block_size)]; k_out, v_out: float32 [num_kv_heads, num_tokens, head_dim]. All contiguous. Raises ValueError for shapes,
    IndexError for ids.
    """
    num_blocks, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    expect(k_out, (num_kv_heads, num_tokens, head_dim), "k_out")
    expect(v_out, k_out.shape, "v_out")
    check_layer(layer, kv_pool)
    used = -(-num_tokens // block_size)
    if used > len(block_table):
        raise ValueError(f"{num_tokens} tokens take {used} blocks and the block table has {len(block_table)}")
    check_block_ids(block_table[:used], num_blocks)
    _gather_kv(kv_pool, layer, block_table, num_tokens, k_out, v_out)


@kernel("void(float32[:,:,:,:,:,::1], int64, int32[::1], int64, float32[:,:,::1], float32[:,:,::1])")
def _gather_kv(
    kv_pool: Float, layer: int, block_table: npt.NDArray[np.int32], num_tokens: int, k_out: Float, v_out: Float
) -> None:
    num_kv_heads, block_size, head_dim = kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5]
    for index in range((num_tokens + block_size - 1) // block_size):
        block = block_table[index]
        start = index * block_size
        num_rows = min(block_size, num_tokens - start)
        for head in range(num_kv_heads):
            for row in range(num_rows):
                for i in range(head_dim):
                    k_out[head, start + row, i] = kv_pool[block, layer, 0, head, row, i]
            for row in range(num_rows):
                for i in range(head_dim):
                    v_out[head, start + row, i] = kv_pool[block, layer, 1, head, row, i]
