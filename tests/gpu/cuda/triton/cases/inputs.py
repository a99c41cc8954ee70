"""Random inputs, and how far from its twin a kernel may be."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from tests.gpu.kernels.paged import Geometry, rng, scattered_tables

SMALL = Geometry(4, 2, 16, 4)
GEOMETRIES = [
    Geometry(4, 2, 32, 16),  # the bundled model
    Geometry(2, 2, 16, 4),  # no sharing
    Geometry(4, 1, 64, 8),
    Geometry(7, 1, 16, 5),  # neither group nor block is a power of two
    Geometry(16, 2, 128, 16),
]
QWEN3_VL_8B = Geometry(32, 8, 128, 16, num_layers=36)
if os.environ.get("TRITON_INTERPRET") != "1":
    GEOMETRIES.append(QWEN3_VL_8B)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *seed: int) -> Tensor:
    return torch.from_numpy(rng(*seed).standard_normal(shape, dtype=np.float32)).to(device, dtype)


def kv_pool(geometry: Geometry, num_blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = geometry
    return normal((num_blocks, g.num_layers, 2, g.num_kv_heads, g.block_size, g.head_dim), dtype, device, 7)


def tables(geometry: Geometry, context_lens: list[int], num_blocks: int, device: torch.device) -> Tensor:
    """Distinct blocks in no order; entries that no context reaches name no block at all."""
    return torch.from_numpy(scattered_tables(geometry, context_lens, num_blocks, 3)).to(device)


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one rounding is the twin's: Triton's interpreter cuts off what does not fit bfloat16."""
    return device.type != "cpu" or dtype == torch.float32


def assert_close(actual: Tensor, expected: Tensor) -> None:
    step = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=step, atol=step)
