"""Random inputs, and how far from its twin a kernel may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpu.cuda.kernels.device import SIMULATED
from tests.gpu.kernels.paged import Geometry, rng, scattered_tables

SMALL = Geometry(4, 2, 16, 8)
QWEN3_VL_8B = Geometry(32, 8, 128, 16, num_layers=36)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *seed: int) -> Tensor:
    return torch.from_numpy(rng(*seed).standard_normal(tuple(shape), dtype=np.float32)).to(device, dtype)


def on_device_too(simulated: list[object], device: list[object]) -> list[object]:
    """Parameters: what the simulator can do in a second, and what a device does beside."""
    return simulated if SIMULATED else simulated + device


def pool_of(geometry: Geometry, num_blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = geometry
    return normal((num_blocks, g.num_layers, 2, g.num_kv_heads, g.block_size, g.head_dim), dtype, device, 7)


def tables_of(geometry: Geometry, context_lens: list[int], num_blocks: int, device: torch.device) -> Tensor:
    """Distinct blocks in no order; entries that no context reaches name no block at all."""
    return torch.from_numpy(scattered_tables(geometry, context_lens, num_blocks, 3)).to(device)


def assert_close(actual: Tensor, expected: Tensor, *, steps: float = 1.0) -> None:
    """Both round a float32 once, and those may differ in their last bits: where a tie lies between, bfloat16 differs by a step.

    A step is 2^-7 of a number. `steps`: where more is rounded on the way.
    """
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=steps * step, atol=steps * step / 8)
