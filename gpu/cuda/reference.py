"""Slow, obvious twins of every CUDA kernel: `TorchKernels` in plain torch, on any device, and block checksums in NumPy.

They reason in float32 and round once, like the kernels; a value of the device is read wherever that makes a line simpler.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu.cuda.kernels import Chunks, Geometry
from gpu.cuda.kernels.checks import (
    check_chunk_attention,
    check_copy_blocks,
    check_experts,
    check_gather_kv,
    check_hash_blocks,
    check_linear,
    check_paged_attention,
    check_rms_norm,
    check_rope_store,
    check_silu_mul,
    check_varlen_chunk_attention,
)

_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR = 0xD6E8FEB86659FD93


class TorchFusedLinear:
    """`gpu.cuda.kernels.FusedLinear`."""

    max_rows = 4

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, norm=norm, max_rows=self.max_rows)
        out.copy_(_normalised(x.float(), norm.float(), eps) @ weight.float().t())

    def norm_silu_mul(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, norm=norm, is_gated=True, max_rows=self.max_rows)
        out.copy_(_silu_mul(_normalised(x.float(), norm.float(), eps) @ weight.float().t()))

    def linear_add(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        check_linear(x, weight, out, max_rows=self.max_rows)
        out.copy_(out.float() + x.float() @ weight.float().t())


class TorchKernels:
    """`gpu.cuda.kernels.Kernels`, for tests and for models on the CPU. Reads device values: no graph can be captured of it."""

    name = "torch"
    fused = TorchFusedLinear()

    def warm_up(self, geometry: Geometry, device: torch.device) -> None:
        """There is nothing to compile."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        check_rms_norm(x, weight, out)
        out.copy_(_normalised(x.float(), weight.float(), eps))

    def add_rms_norm(self, delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        check_rms_norm(x, weight, out, delta)
        x.copy_(x.float() + delta.float())
        out.copy_(_normalised(x.float(), weight.float(), eps))

    def rope_store(
        self,
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
        check_rope_store(qkv, q_norm, k_norm, cos, sin, kv_pool, layer, slots, q_out)
        num_blocks, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
        num_heads = q_out.shape[1]
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        q, k = q.float(), k.float()
        if q_norm is not None and k_norm is not None:
            q, k = _normalised(q, q_norm.float(), eps), _normalised(k, k_norm.float(), eps)
        q_out.copy_(_rotated(q, cos, sin))
        inside = (slots >= 0) & (slots < num_blocks * block_size)
        block, place = slots[inside] // block_size, slots[inside] % block_size
        kv_pool[block, layer, 0, :, place] = _rotated(k, cos, sin)[inside].to(kv_pool.dtype)
        kv_pool[block, layer, 1, :, place] = v[inside]

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        check_silu_mul(gate_up, out)
        out.copy_(_silu_mul(gate_up.float()))

    def experts(
        self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, num_chosen: int, normalizes: bool, out: Tensor
    ) -> None:
        check_experts(x, logits, gate_up, down, num_chosen, out)
        shares, chosen = logits.softmax(dim=-1).topk(num_chosen)
        if normalizes:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        total = torch.zeros(x.shape, device=x.device)
        for row in range(len(x)):
            for share, expert in zip(shares[row], chosen[row], strict=True):
                inner = _silu_mul(gate_up[expert].float() @ x[row].float()).to(x.dtype)
                total[row] += share * (down[expert].float() @ inner.float()).to(x.dtype)
        out.copy_(total)

    def workspace_floats(self, max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
        return 0

    def paged_attention(
        self,
        q: Tensor,
        kv_pool: Tensor,
        layer: int,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor,
        workspace: Tensor,
    ) -> None:
        check_paged_attention(q, kv_pool, layer, block_tables, context_lens, out, workspace, 0)
        for seq, context_len in enumerate(context_lens.tolist()):
            if context_len == 0:
                out[seq] = 0
            else:
                k, v = _context(kv_pool, layer, block_tables[seq], context_len)
                out[seq] = _attention(q[seq : seq + 1], k, v, scale)[0].to(out.dtype)

    def chunk_attention(
        self, q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, out: Tensor
    ) -> None:
        check_chunk_attention(q, kv_pool, layer, block_table, context_len, out)
        k, v = _context(kv_pool, layer, block_table, context_len)
        out.copy_(_attention(q, k, v, scale))

    def varlen_chunk_attention(self, q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor) -> None:
        check_varlen_chunk_attention(q, kv_pool, layer, chunks, out)
        for (start, num_tokens, context_len), block_table in zip(chunks.spans.t().tolist(), chunks.block_tables, strict=True):
            part = slice(start, start + num_tokens)
            self.chunk_attention(q[part], kv_pool, layer, block_table, context_len, scale, out[part])

    def gather_kv(self, kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
        check_gather_kv(kv_pool, layer, block_table, num_tokens, k_out, v_out)
        k, v = _context(kv_pool, layer, block_table, num_tokens)
        block_of_token = block_table.repeat_interleave(kv_pool.shape[4])[:num_tokens]
        inside = (block_of_token >= 0) & (block_of_token < len(kv_pool))
        k_out[:, inside], v_out[:, inside] = k[:, inside], v[:, inside]

    def copy_blocks(self, src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
        check_copy_blocks(src, src_ids, dst, dst_ids, sums)
        inside = (src_ids >= 0) & (src_ids < len(src)) & (dst_ids >= 0) & (dst_ids < len(dst))
        rows = src[src_ids[inside]]
        dst[dst_ids[inside]] = rows
        if sums is not None:
            sums.zero_()
            sums[inside] = _sum64(rows)

    def hash_blocks(self, src: Tensor, ids: Tensor, sums: Tensor) -> None:
        check_hash_blocks(src, ids, sums)
        inside = (ids >= 0) & (ids < len(src))
        sums.zero_()
        sums[inside] = _sum64(src[ids[inside]])


def sum64_rows(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The checksum of each block: uint8 [k, bytes] -> uint64 [k].

    A block is read as little-endian 64-bit words w[i]. Its checksum is the sum over i of mix(w[i] ^ (i + 1) * golden ratio), all
    modulo 2^64: words may be added up in any order, and a word that changes, or two that change places, change the sum. mix is
    Degski's 64-bit mixer (two rounds of xor-shift and multiply, as in SplitMix; Steele et al. 2014), a bijection.
    """
    words = np.ascontiguousarray(rows).view("<u8")
    z = words ^ (np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    for _ in range(2):
        z ^= z >> np.uint64(32)
        z *= np.uint64(_FACTOR)
    z ^= z >> np.uint64(32)
    sums: npt.NDArray[np.uint64] = z.sum(axis=1, dtype=np.uint64)
    return sums


def _sum64(rows: Tensor) -> Tensor:
    """`sum64_rows` in torch, whose int64 wraps around: uint8 [k, bytes] -> int64 [k]."""
    words = rows.contiguous().view(torch.int64)
    z = words ^ (torch.arange(1, words.shape[1] + 1, device=rows.device) * _signed(_GOLDEN))
    for _ in range(2):
        z = (z ^ _high_half(z)) * _signed(_FACTOR)
    return (z ^ _high_half(z)).sum(dim=1)


def _high_half(z: Tensor) -> Tensor:
    return (z >> 32) & 0xFFFFFFFF


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _context(kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [num_kv_heads, num_tokens, head_dim]; an id outside of the pool stands for its nearest block."""
    _, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    table = block_table[: -(-num_tokens // block_size)].long().clamp(0, len(kv_pool) - 1)
    blocks = kv_pool[table, layer]  # [blocks, 2, num_kv_heads, block_size, head_dim]
    k, v = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, len(table) * block_size, head_dim)[:, :, :num_tokens]
    return k, v


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q: the last [T, Hq, D] of k's and v's tokens [Hk, n, D]; causal; float32 [T, Hq, D]."""
    num_queries, num_heads, _ = q.shape
    num_tokens = k.shape[1]
    group = num_heads // len(k)
    k, v = (x.float().repeat_interleave(group, dim=0) for x in (k, v))
    scores = scale * torch.einsum("qhd,hkd->hqk", q.float(), k)
    last = torch.arange(num_tokens - num_queries, num_tokens, device=q.device)
    hidden = torch.arange(num_tokens, device=q.device) > last[:, None]
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), v)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, D]; cos, sin: [T, D/2]."""
    left, right = x.chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat([left * c - right * s, right * c + left * s], dim=-1)
