"""NumbaKernels: the kernels that run on any CUDA device, and without one in Numba's simulator. One file each beside this one."""

from __future__ import annotations

import torch

from gpu.cuda.kernels import Geometry
from gpu.cuda.kernels.chunk_attention import chunk_attention, varlen_chunk_attention
from gpu.cuda.kernels.copy_blocks import copy_blocks, hash_blocks
from gpu.cuda.kernels.experts import experts
from gpu.cuda.kernels.gather_kv import gather_kv
from gpu.cuda.kernels.paged_attention import paged_attention, workspace_floats
from gpu.cuda.kernels.rms_norm import add_rms_norm, rms_norm
from gpu.cuda.kernels.rope_store import rope_store
from gpu.cuda.kernels.silu_mul import silu_mul
from gpu.cuda.kernels.warm_up import run_all


class NumbaKernels:
    """`gpu.cuda.kernels.Kernels`. Each function says what it asks beyond that: powers of two, whole units of 16 bytes."""

    name = "numba"
    fused = None

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    rope_store = staticmethod(rope_store)
    silu_mul = staticmethod(silu_mul)
    experts = staticmethod(experts)
    workspace_floats = staticmethod(workspace_floats)
    paged_attention = staticmethod(paged_attention)
    chunk_attention = staticmethod(chunk_attention)
    varlen_chunk_attention = staticmethod(varlen_chunk_attention)
    gather_kv = staticmethod(gather_kv)
    copy_blocks = staticmethod(copy_blocks)
    hash_blocks = staticmethod(hash_blocks)

    def warm_up(self, geometry: Geometry, device: torch.device) -> None:
        run_all(self, geometry, device)
