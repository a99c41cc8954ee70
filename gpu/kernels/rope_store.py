"""rope_store: all that lies between a layer's fused QKV projection and its attention, in one pass over the projection.

Head-wise RMSNorm of queries and keys (as Qwen3 has it), rotary embedding (Su et al. 2021, halves rotated against each other),
keys and values into their slots of the pool, queries into an array of their own.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_layer, check_slots, expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]


def rope_store(
    qkv: Float,
    q_weight: Float,
    k_weight: Float,
    eps: float,
    cos: Float,
    sin: Float,
    kv_pool: Float,
    layer: int,
    slots: npt.NDArray[np.int64],
    q_out: Float,
) -> None:
    """Normalise and rotate the queries into `q_out` and the keys into the pool, beside the values.

    qkv: float32 [n, (num_heads + 2 * num_kv_heads) * head_dim], heads of q, then k, then v; q_weight, k_weight: float32
    [head_dim]; cos, sin: float32 [n, head_dim / 2]; kv_pool: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size,
    head_dim]; slots: int64 [n]; q_out: float32 [n, num_heads, head_dim]. All contiguous. Raises ValueError for shapes, IndexError
    for slots.
    """
    num_blocks, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_tokens, num_heads, _ = q_out.shape
    expect(q_out, (num_tokens, num_heads, head_dim), "q_out")
    expect(qkv, (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), "qkv")
    expect(q_weight, (head_dim,), "q_weight")
    expect(k_weight, (head_dim,), "k_weight")
    expect(cos, (num_tokens, head_dim // 2), "cos")
    expect(sin, cos.shape, "sin")
    expect(slots, (num_tokens,), "slots")
    if head_dim % 2:
        raise ValueError(f"a head of {head_dim} has no halves to rotate")
    check_layer(layer, kv_pool)
    check_slots(slots, num_blocks * block_size)
    _rope_store(qkv, q_weight, k_weight, eps, cos, sin, kv_pool, layer, slots, q_out)


@kernel(
    "void(float32[:,::1], float32[::1], float32[::1], float64, float32[:,::1], float32[:,::1], "
    "float32[:,:,:,:,:,::1], int64, int64[::1], float32[:,:,::1])"
)
def _rope_store(
    qkv: Float,
    q_weight: Float,
    k_weight: Float,
    eps: float,
    cos: Float,
    sin: Float,
    kv_pool: Float,
    layer: int,
    slots: npt.NDArray[np.int64],
    q_out: Float,
) -> None:
    num_kv_heads, block_size, head_dim = kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5]
    num_heads = q_out.shape[1]
    half = head_dim // 2
    for token in range(slots.shape[0]):
        block = slots[token] // block_size
        offset = slots[token] - block * block_size
        for head in range(num_heads + num_kv_heads):
            source = qkv[token, head * head_dim : (head + 1) * head_dim]
            if head < num_heads:
                target = q_out[token, head]
                weight = q_weight
            else:
                target = kv_pool[block, layer, 0, head - num_heads, offset]
                weight = k_weight
            squares = np.float32(0.0)
            for i in range(head_dim):
                squares += source[i] * source[i]
            factor = np.float32(1.0 / math.sqrt(squares / head_dim + eps))
            for i in range(half):
                left = source[i] * factor * weight[i]
                right = source[half + i] * factor * weight[half + i]
                target[i] = left * cos[token, i] - right * sin[token, i]
                target[half + i] = right * cos[token, i] + left * sin[token, i]
        for head in range(num_kv_heads):
            start = (num_heads + num_kv_heads + head) * head_dim
            for i in range(head_dim):
                kv_pool[block, layer, 1, head, offset, i] = qkv[token, start + i]
