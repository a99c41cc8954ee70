"""TritonKernels: the kernel set for GPUs that Triton compiles for. Knows the device's size; each kernel is a file of its own."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from gpu.cuda.kernels import Chunks, FusedLinear, Geometry
from gpu.cuda.triton.chunk_attention import chunk_attention, varlen_chunk_attention
from gpu.cuda.triton.copy_blocks import copy_blocks, hash_blocks
from gpu.cuda.triton.experts import experts
from gpu.cuda.triton.fused_linear import TritonFusedLinear
from gpu.cuda.triton.gather_kv import gather_kv
from gpu.cuda.triton.norm import add_rms_norm, rms_norm
from gpu.cuda.triton.paged_attention import paged_attention, workspace_floats
from gpu.cuda.triton.rope_store import rope_store
from gpu.cuda.triton.silu_mul import silu_mul
from gpu.cuda.triton.warm_up import launch_everything, launch_linear


class TritonKernels:
    """`gpu.cuda.kernels.Kernels`. Heads are a power of two of at least 16; `chunk_attention` takes no temporary memory either.

    `num_sms`: multiprocessors that the work is cut for; those of torch's current device if it is 0. It changes how sums are
    grouped and nothing else.
    """

    name = "triton"

    def __init__(self, num_sms: int = 0) -> None:
        self.fused: FusedLinear | None = TritonFusedLinear()
        self._num_sms = num_sms or torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def warm_up(self, geometry: Geometry, device: torch.device) -> None:
        """See `gpu.cuda.kernels.Kernels`. A few seconds, less once Triton has this geometry in its cache on disk.

        Fused layers are a gain that nobody depends on: where they cannot be compiled, the set goes on without them, and says so.
        """
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            launch_everything(self, geometry, device)
            if self.fused is not None:
                try:
                    launch_linear(self.fused, geometry, device)
                except Exception as error:  # whatever a compiler comes up with; a device that has failed fails again below
                    warnings.warn(f"no fused linear layers: {error}", RuntimeWarning, stacklevel=2)
                    self.fused = None
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        rms_norm(x, weight, eps, out)

    def add_rms_norm(self, delta: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        add_rms_norm(delta, x, weight, eps, out)

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
        rope_store(qkv, q_norm, k_norm, eps, cos, sin, kv_pool, layer, slots, q_out)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        silu_mul(gate_up, out)

    def experts(
        self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, num_chosen: int, normalizes: bool, out: Tensor
    ) -> None:
        experts(x, logits, gate_up, down, num_chosen, normalizes, out)

    def workspace_floats(self, max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
        return workspace_floats(max_seqs, num_heads, num_kv_heads, head_dim, self._num_sms)

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
        paged_attention(q, kv_pool, layer, block_tables, context_lens, scale, out, workspace, self._num_sms)

    def chunk_attention(
        self, q: Tensor, kv_pool: Tensor, layer: int, block_table: Tensor, context_len: int, scale: float, out: Tensor
    ) -> None:
        chunk_attention(q, kv_pool, layer, block_table, context_len, scale, out, self._num_sms)

    def varlen_chunk_attention(self, q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor) -> None:
        varlen_chunk_attention(q, kv_pool, layer, chunks, scale, out, self._num_sms)

    def gather_kv(self, kv_pool: Tensor, layer: int, block_table: Tensor, num_tokens: int, k_out: Tensor, v_out: Tensor) -> None:
        gather_kv(kv_pool, layer, block_table, num_tokens, k_out, v_out)

    def copy_blocks(self, src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
        copy_blocks(src, src_ids, dst, dst_ids, sums)

    def hash_blocks(self, src: Tensor, ids: Tensor, sums: Tensor) -> None:
        hash_blocks(src, ids, sums)
