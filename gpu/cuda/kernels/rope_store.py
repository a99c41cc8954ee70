"""rope_store: all between the fused QKV projection and attention, in one pass over the projection.

A few neighbouring threads share a head: each holds one unit of its left half and the unit that rotates with it in the right half.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.checks import check_rope_store
from gpu.cuda.kernels.device import SIMULATED, WARP, lane_sum, load_i64, load_words, packing, store_words
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.shapes import log2, units_per_row

_THREADS = 16 if SIMULATED else 128
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


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
    """`Kernels.rope_store`. D is a power of two, half of it whole units of 16 bytes; block_size is a power of two."""
    check_rope_store(qkv, q_norm, k_norm, cos, sin, kv_pool, layer, slots, q_out)
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    num_tokens, num_heads, _ = q_out.shape
    half_units = units_per_row(head_dim // 2, kv_pool.dtype, "half a head")
    if half_units > WARP:
        raise ValueError(f"a head of {head_dim} is too long")
    log2(half_units, "half a head in units")
    shift = log2(block_size, "block_size")
    kernel = _kernel(kv_pool.dtype, half_units, num_heads, num_kv_heads, shift, q_norm is not None)
    grid = (-(-num_tokens * (num_heads + 2 * num_kv_heads) * half_units // _THREADS),)
    kernel.launch(
        grid,
        kv_pool.device,
        units(qkv),
        units(qkv if q_norm is None else q_norm),
        units(qkv if k_norm is None else k_norm),
        np.float32(eps),
        units(cos),
        units(sin),
        units(kv_pool),
        num_blocks,
        num_layers,
        layer,
        units(slots),
        num_tokens,
        units(q_out),
    )


@cache
def _kernel(dtype: torch.dtype, half_units: int, num_heads: int, num_kv_heads: int, shift: int, has_norm: bool) -> Kernel:
    width, unpack, pack = packing(dtype)
    _, unpack_f32, _ = packing(torch.float32)
    angle_units = width // 4  # of cosines, for one unit of a head
    head_units = 2 * half_units
    all_heads = num_heads + 2 * num_kv_heads
    block_size = 1 << shift
    numbers = 2 * width
    mean = np.float32(1.0 / (half_units * numbers))

    def rope_store_kernel(
        qkv: Any,
        q_norm: Any,
        k_norm: Any,
        eps: Any,
        cos: Any,
        sin: Any,
        kv_pool: Any,
        num_blocks: int,
        num_layers: int,
        layer: int,
        slots: Any,
        num_tokens: int,
        q_out: Any,
    ) -> None:
        # threads: [token, head, unit of half a head]
        thread = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
        lane = thread % half_units
        row = thread // half_units
        token = row // all_heads
        head = row - token * all_heads
        is_live = token < num_tokens
        if not is_live:
            token, head = num_tokens - 1, 0
        source = (token * all_heads + head) * head_units + lane
        left_words, right_words = load_words(qkv, source), load_words(qkv, source + half_units)
        slot = load_i64(slots, token)
        values = cuda.local.array(numbers, np.float32)
        weights = cuda.local.array(numbers, np.float32)
        c = cuda.local.array(width, np.float32)
        s = cuda.local.array(width, np.float32)
        angles = (token * half_units + lane) * angle_units
        for i in range(angle_units):
            unpack_f32(load_words(cos, angles + i), c, 4 * i)
            unpack_f32(load_words(sin, angles + i), s, 4 * i)
        unpack(left_words, values, 0)
        unpack(right_words, values, width)
        if has_norm:
            norm = q_norm if head < num_heads else k_norm
            unpack(load_words(norm, lane), weights, 0)
            unpack(load_words(norm, lane + half_units), weights, width)
            squares = _ZERO
            for i in range(numbers):
                squares += values[i] * values[i]
            factor = _ONE / np.float32(math.sqrt(lane_sum(squares, half_units) * mean + eps))
            for i in range(numbers):
                values[i] = values[i] * factor * weights[i]
        for i in range(width):
            left, right = values[i], values[width + i]
            values[i] = left * c[i] - right * s[i]
            values[width + i] = right * c[i] + left * s[i]
        if head < num_heads + num_kv_heads:  # values stay as they are
            left_words, right_words = pack(values, 0), pack(values, width)
        if is_live:
            if head < num_heads:
                target = (token * num_heads + head) * head_units + lane
                store_words(q_out, target, left_words)
                store_words(q_out, target + half_units, right_words)
            elif 0 <= slot < num_blocks * block_size:
                plane = ((slot >> shift) * num_layers + layer) * 2 * num_kv_heads + head - num_heads
                target = ((plane << shift) + (slot & (block_size - 1))) * head_units + lane
                store_words(kv_pool, target, left_words)
                store_words(kv_pool, target + half_units, right_words)

    arguments = "int64, int64, int64, float32, int64, int64, int64, int64, int64, int64, int64, int64, int64"
    return Kernel(rope_store_kernel, arguments, _THREADS)
