"""The CPU kernels: NumPy arrays in, NumPy arrays out, no allocation that the caller did not make. One file each.

Whole blocks are moved by `gpu.copy`, which checks its rows before it hands addresses to the kernels of copy_rows.
"""

from __future__ import annotations

from gpu.kernels.choose_experts import choose_experts
from gpu.kernels.chunk_attention import chunk_attention
from gpu.kernels.compiler import warm_up
from gpu.kernels.gather_kv import gather_kv
from gpu.kernels.mix_rows import mix_rows
from gpu.kernels.norm import add_rms_norm, rms_norm
from gpu.kernels.paged_attention import paged_attention
from gpu.kernels.rope_store import rope_store
from gpu.kernels.silu_mul import silu_mul
from gpu.kernels.store_kv import store_kv

__all__ = [
    "add_rms_norm",
    "choose_experts",
    "chunk_attention",
    "gather_kv",
    "mix_rows",
    "paged_attention",
    "rms_norm",
    "rope_store",
    "silu_mul",
    "store_kv",
    "warm_up",
]
