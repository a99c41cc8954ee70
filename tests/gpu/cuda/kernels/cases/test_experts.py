"""The layer of experts that is made of torch's own products: against the twin, at edges of what they take."""

from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.kernels.cases.inputs import assert_close, normal, on_device_too

# rows, width, inner, experts, chosen
SIZES = on_device_too(
    [(0, 32, 16, 4, 2), (1, 32, 16, 4, 1), (1, 64, 24, 8, 8), (17, 136, 72, 6, 2), (90, 32, 16, 3, 2)], [(200, 2048, 768, 128, 8)]
)


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("normalizes", [False, True], ids=["", "normalizes"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts(
    kernels: Kernels,
    twin: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int, int, int, int],
    normalizes: bool,
    turned: bool,
) -> None:
    rows, width, inner, count, chosen = size
    x, logits = normal((rows, width), dtype, device, 1), 2 * normal((rows, count), torch.float32, device, 4)
    gate_up = normal((count, 2 * inner, width), dtype, device, 2) / width**0.5
    down = normal((count, width, inner), dtype, device, 3) / inner**0.5
    if turned:
        gate_up, down = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (gate_up, down))
    out, expected = torch.full_like(x, torch.nan), torch.empty_like(x)
    kernels.experts(x, logits, gate_up, down, chosen, normalizes, out)
    twin.experts(x, logits, gate_up, down, chosen, normalizes, expected)
    assert_close(out, expected, steps=8)
