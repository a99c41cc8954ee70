"""Slow, obvious NumPy twins of every kernel: the same arguments, the same results, one line of reasoning each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]


def store_kv(k: Float, v: Float, kv_pool: Float, layer: int, slots: Ids) -> None:
    block_size = kv_pool.shape[4]
    for token, slot in enumerate(slots):
        kv_pool[slot // block_size, layer, 0, :, slot % block_size] = k[token]
        kv_pool[slot // block_size, layer, 1, :, slot % block_size] = v[token]


def gather_kv(kv_pool: Float, layer: int, block_table: Ints, num_tokens: int, k_out: Float, v_out: Float) -> None:
    block_size = kv_pool.shape[4]
    for token in range(num_tokens):
        block = block_table[token // block_size]
        k_out[:, token] = kv_pool[block, layer, 0, :, token % block_size]
        v_out[:, token] = kv_pool[block, layer, 1, :, token % block_size]


def paged_attention(
    q: Float, kv_pool: Float, layer: int, block_tables: Ints, context_lens: Ints, scale: float, out: Float
) -> None:
    """In float64, so that what differs is the kernel's error."""
    num_kv_heads, head_dim = kv_pool.shape[3], kv_pool.shape[5]
    group = q.shape[1] // num_kv_heads
    for seq, context_len in enumerate(context_lens):
        k = np.empty((num_kv_heads, context_len, head_dim), np.float32)
        v = np.empty_like(k)
        gather_kv(kv_pool, layer, block_tables[seq], int(context_len), k, v)
        for head in range(q.shape[1]):
            if context_len == 0:
                out[seq, head] = 0
                continue
            scores = scale * k[head // group].astype(np.float64) @ q[seq, head].astype(np.float64)
            weights = np.exp(scores - scores.max())
            out[seq, head] = weights / weights.sum() @ v[head // group]


def chunk_attention(q: Float, kv_pool: Float, layer: int, block_table: Ints, context_len: int, scale: float, out: Float) -> None:
    """Each query is a sequence of its own that ends with it."""
    num_tokens = len(q)
    tables = np.broadcast_to(block_table, (num_tokens, len(block_table)))
    lens = np.arange(context_len - num_tokens + 1, context_len + 1, dtype=np.int32)
    paged_attention(q, kv_pool, layer, tables, lens, scale, out)


def rms_norm(x: Float, weight: Float, eps: float, out: Float) -> None:
    wide = x.astype(np.float64)
    out[:] = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight


def add_rms_norm(x: Float, residual: Float, weight: Float, eps: float, out: Float) -> None:
    residual += x
    rms_norm(residual, weight, eps, out)


def silu_mul(gate_up: Float, out: Float) -> None:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    out[:] = gate / (1 + np.exp(-gate)) * up


def choose_experts(logits: Float, normalizes: bool, chosen: Ids, shares: Float) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    chosen[:] = np.argsort(-logits, axis=1, kind="stable")[:, : chosen.shape[1]]
    picked = np.take_along_axis(weights, chosen, axis=1)
    shares[:] = picked / (picked if normalizes else weights).sum(axis=1, keepdims=True)


def mix_rows(rows: Float, places: Ids, shares: Float, out: Float) -> None:
    out[:] = (rows[places].astype(np.float64) * shares[:, :, None]).sum(axis=1)


def rope_store(
    qkv: Float,
    q_weight: Float,
    k_weight: Float,
    eps: float,
    cos: Float,
    sin: Float,
    kv_pool: Float,
    layer: int,
    slots: Ids,
    q_out: Float,
) -> None:
    num_tokens, num_heads, head_dim = q_out.shape
    num_kv_heads = kv_pool.shape[3]
    heads = qkv.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    q_out[:] = _rotated(_normalised(q, q_weight, eps), cos, sin)
    store_kv(_rotated(_normalised(k, k_weight, eps), cos, sin), v, kv_pool, layer, slots)


def _normalised(x: Float, weight: Float, eps: float) -> Float:
    out = np.empty_like(x)
    rms_norm(x, weight, eps, out)
    return out


def _rotated(x: Float, cos: Float, sin: Float) -> Float:
    """x: [n, heads, head_dim]; cos, sin: [n, head_dim / 2]."""
    left, right = np.split(x, 2, axis=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([left * c - right * s, right * c + left * s], axis=-1)
