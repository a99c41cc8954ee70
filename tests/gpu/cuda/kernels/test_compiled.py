"""What is launched for Qwen3-VL-8B, compiled for Hopper without one: arrays are in registers, memory moves 16 bytes at a time.

The product's own functions launch on tensors without memory, and what would be launched is kept and compiled instead.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numba import cuda
from numba.core.sigutils import normalize_signature
from numba.cuda import dispatcher

from gpu.cuda.kernels import Geometry
from gpu.cuda.kernels.launch import Kernel
from gpu.cuda.kernels.numba_set import NumbaKernels

GEOMETRY = Geometry(
    dtype=torch.bfloat16,
    hidden_size=4096,
    intermediate_size=12288,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
)


@pytest.fixture(scope="module")
def launched() -> dict[str, list[Kernel]]:
    """All that a model of this geometry launches, by the name of its function."""
    kernels: dict[str, list[Kernel]] = {}

    def keep(self: Kernel, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        assert len(arguments_of(self)) == len(arguments)
        kept = kernels.setdefault(self.function.__name__, [])
        if self not in kept:
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", keep)
        NumbaKernels().warm_up(GEOMETRY, torch.device("meta"))
    return kernels


def ptx_of(kernel: Kernel, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))
    ptx, _ = cuda.compile_ptx(kernel.function, arguments_of(kernel), cc=(9, 0))
    return str(ptx)


def arguments_of(kernel: Kernel) -> tuple[Any, ...]:
    """Their types, as Numba has them."""
    arguments, _ = normalize_signature(kernel.signature)  # type: ignore[no-untyped-call]
    return tuple(arguments)


def test_the_warm_up_leaves_nothing_out(launched: dict[str, list[Kernel]]) -> None:
    assert {name: len(kernels) for name, kernels in launched.items()} == {
        "rms_norm_kernel": 2,  # with and without what is added
        "silu_mul_kernel": 1,
        "rope_store_kernel": 1,
        "paged_attention_kernel": 2,  # split or not
        "merge_splits_kernel": 1,
        "gather_kv_kernel": 1,
        "copy_blocks_kernel": 3,  # copy, sum, or both
    }


@pytest.mark.parametrize(
    ("name", "wide_loads"),
    [
        ("rms_norm_kernel", 3),
        ("silu_mul_kernel", 4),
        ("rope_store_kernel", 8),
        ("paged_attention_kernel", 20),  # keys and values of a tile ahead of the loop and in it, and the queries
        ("merge_splits_kernel", 2),
        ("gather_kv_kernel", 4),
        ("copy_blocks_kernel", 8),
    ],
)
def test_arrays_are_registers_and_loads_are_wide(
    launched: dict[str, list[Kernel]], monkeypatch: pytest.MonkeyPatch, name: str, wide_loads: int
) -> None:
    ptx = ptx_of(launched[name][-1], monkeypatch)
    assert ".local" not in ptx
    assert "call" not in ptx
    assert ptx.count("ld.global.v4") + ptx.count("ld.global.v2.u64") >= wide_loads
