"""gather_kv: a program copies a run of tokens of one head, keys or values, out of their blocks."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_gather_kv
from gpu.cuda.triton.compiler import kernel, power_of_two

_TILE_NUMBERS = 8192  # of one program: tokens times head_dim


def gather_kv(kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_gather_kv(kv_pool, layer, block_table, num_tokens, k_out, v_out)
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    padded = power_of_two(head_dim)
    tile = max(_TILE_NUMBERS // padded, 1)
    if not num_tokens:
        return
    _gather_kv[(-(-num_tokens // tile), num_kv_heads, 2)](
        kv_pool,
        layer,
        num_blocks,
        num_layers,
        block_table,
        num_tokens,
        k_out,
        v_out,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        PADDED=padded,
        TILE=tile,
        num_warps=4,
    )


@kernel("layer", "num_blocks", "num_layers", "num_tokens", small=("block_table",))
def _gather_kv(
    kv_pool: tl.tensor,
    layer: tl.tensor,
    num_blocks: tl.tensor,
    num_layers: tl.tensor,
    block_table: tl.tensor,
    num_tokens: tl.tensor,
    k_out: tl.tensor,
    v_out: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    LAYER_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_STRIDE
    head = tl.program_id(1)
    part = tl.program_id(2)  # 0: keys, 1: values
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED)
    ids = tl.load(block_table + tokens // BLOCK_SIZE, mask=tokens < num_tokens, other=-1)
    rows = (ids.to(tl.int64) * num_layers + layer) * LAYER_STRIDE + tokens % BLOCK_SIZE * HEAD_DIM
    inside = ((ids >= 0) & (ids < num_blocks))[:, None] & (dims < HEAD_DIM)[None, :]
    source = kv_pool + (part * NUM_KV_HEADS + head) * HEAD_STRIDE
    numbers = tl.load(source + rows[:, None] + dims[None, :], mask=inside)
    target = (head.to(tl.int64) * num_tokens + tokens)[:, None] * HEAD_DIM + dims[None, :]
    if part == 0:
        tl.store(k_out + target, numbers, mask=inside)
    else:
        tl.store(v_out + target, numbers, mask=inside)
