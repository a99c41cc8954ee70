"""rope_store: head-wise norm, rotary embedding and storing of one token's heads, all in one launch.

A program takes a few heads of one token, all of them queries, all keys or all values.
"""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_rope_store
from gpu.cuda.triton.compiler import inlined, kernel, power_of_two

_MAX_HEADS = 8  # of one program


def rope_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv_pool: Tensor,
    layer: int,
    slots: Tensor,
    q_out: Tensor,
) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_rope_store(qkv, q_norm, k_norm, cos, sin, kv_pool, layer, slots, q_out)
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_tokens, num_heads, _ = q_out.shape
    common = math.gcd(num_heads, num_kv_heads)
    heads = min(common & -common, _MAX_HEADS)  # a power of two, which a tile must be
    if not num_tokens:
        return
    _rope_store[(num_tokens, (num_heads + 2 * num_kv_heads) // heads)](
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        eps,
        cos,
        sin,
        kv_pool,
        layer,
        num_blocks,
        num_layers,
        slots,
        q_out,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        PADDED=power_of_two(head_dim // 2),
        HEADS=heads,
        HAS_NORM=q_norm is not None,
        num_warps=min(max(heads * head_dim // 256, 1), 4),
    )


@inlined
def _turned(
    left: tl.tensor,
    right: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dims: tl.tensor,
    inside: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> Any:
    """Both halves of some heads [HEADS, PADDED], normalised and rotated, in their own dtype."""
    dtype: tl.constexpr = left.dtype
    left = left.to(tl.float32)
    right = right.to(tl.float32)
    if HAS_NORM:
        left_weight = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
        right_weight = tl.load(weight + HEAD_DIM // 2 + dims, mask=inside, other=0.0).to(tl.float32)
        shrink = tl.rsqrt(tl.sum(left * left + right * right, axis=1) / HEAD_DIM + eps)
        left = left * shrink[:, None] * left_weight[None, :]
        right = right * shrink[:, None] * right_weight[None, :]
    turned = left * cos[None, :] - right * sin[None, :]
    right = right * cos[None, :] + left * sin[None, :]
    return turned.to(dtype), right.to(dtype)


@kernel("layer", "num_blocks", "num_layers", small=("slots",))
def _rope_store(
    qkv: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    kv_pool: tl.tensor,
    layer: tl.tensor,
    num_blocks: tl.tensor,
    num_layers: tl.tensor,
    slots: tl.tensor,
    q_out: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, PADDED)
    inside = dims < HALF
    both = inside[None, :]
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + first) * HEAD_DIM + heads[:, None] * HEAD_DIM + dims[None, :]
    left = tl.load(source, mask=both, other=0.0)
    right = tl.load(source + HALF, mask=both, other=0.0)
    cosines = tl.load(cos + token * HALF + dims, mask=inside, other=0.0)
    sines = tl.load(sin + token * HALF + dims, mask=inside, other=0.0)
    if first < NUM_HEADS:
        left, right = _turned(left, right, q_norm, eps, cosines, sines, dims, inside, HEAD_DIM, HAS_NORM)
        target = q_out + (token * NUM_HEADS + first) * HEAD_DIM + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, left, mask=both)
        tl.store(target + HALF, right, mask=both)
    else:
        head = first - NUM_HEADS  # of the keys, then of the values, which lie behind them in a block as well
        if head < NUM_KV_HEADS:
            left, right = _turned(left, right, k_norm, eps, cosines, sines, dims, inside, HEAD_DIM, HAS_NORM)
        slot = tl.load(slots + token)
        if (slot >= 0) & (slot < num_blocks.to(tl.int64) * BLOCK_SIZE):
            row = (slot // BLOCK_SIZE * num_layers + layer) * (2 * NUM_KV_HEADS) + head
            start = row * (BLOCK_SIZE * HEAD_DIM) + slot % BLOCK_SIZE * HEAD_DIM
            target = kv_pool + start + heads[:, None] * (BLOCK_SIZE * HEAD_DIM) + dims[None, :]
            tl.store(target, left, mask=both)
            tl.store(target + HALF, right, mask=both)
