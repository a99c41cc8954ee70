from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.triton.cases.inputs import assert_close, normal


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 96), (2, 1023), (2, 1024), (1, 1025), (1, 12288)], ids=str)
def test_silu_mul(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = 3 * normal((shape[0], 2 * shape[1]), dtype, device, 1)
    out, expected = torch.full(shape, torch.nan, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    kernels.silu_mul(gate_up, out)
    twin.silu_mul(gate_up, expected)
    assert_close(out, expected)
