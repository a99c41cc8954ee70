"""rms_norm, add_rms_norm and silu_mul: what works row by row."""

from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.kernels.cases.inputs import assert_close, normal, on_device_too

# in units: fewer than a warp's threads, more than a warp's, no multiple of them
WIDTHS = on_device_too([8, 48, 72, 136], [4096, 5120, 12288])
ROWS = on_device_too([0, 1, 3], [64, 1000])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = 3 * normal((rows, width), dtype, device, 1), normal((width,), dtype, device, 2)
    out, expected = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    kernels.rms_norm(x, weight, 1e-3, out)
    twin.rms_norm(x, weight, 1e-3, expected)
    assert_close(out, expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, width: int) -> None:
    x, delta, weight = (normal((3, width), dtype, device, seed) for seed in (1, 2, 3))
    summed, expected = x.clone(), torch.empty_like(x)
    twin.add_rms_norm(delta, summed, weight[0], 1e-6, expected)
    kernels.add_rms_norm(delta, x, weight[0], 1e-6, delta)  # the result in the place of delta
    assert torch.equal(x, summed)
    assert_close(delta, expected)


def test_what_is_normalised_is_the_sum_as_it_is_stored(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    x, delta, weight = (normal((3, 136), dtype, device, seed) for seed in (1, 2, 3))
    out, again = torch.empty_like(x), torch.empty_like(x)
    kernels.add_rms_norm(delta, x, weight[0], 1e-6, out)
    kernels.rms_norm(x, weight[0], 1e-6, again)
    assert torch.equal(out, again)


def test_the_result_may_take_the_place_of_its_input(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    x, weight = normal((2, 40), dtype, device, 1), normal((40,), dtype, device, 2)
    expected = torch.empty_like(x)
    twin.rms_norm(x, weight, 1e-6, expected)
    kernels.rms_norm(x, weight, 1e-6, x)
    assert_close(x, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = 4 * normal((rows, 2 * width), dtype, device, 1)
    out = torch.full((rows, width), torch.nan, dtype=dtype, device=device)
    expected = torch.empty_like(out)
    kernels.silu_mul(gate_up, out)
    twin.silu_mul(gate_up, expected)
    assert_close(out, expected)


def test_gates_far_from_zero(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-300.0, -100.0, -90.0, 0.0, 90.0, 100.0, 300.0, 1.0]], dtype=dtype, device=device)
    out = torch.empty_like(gate)
    kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), out)
    assert out[0, 3:7].tolist() == gate[0, 3:7].tolist()
    assert out[0, :3].abs().max() < 1e-30


def test_what_does_not_fit_is_refused(kernels: Kernels, device: torch.device) -> None:
    x = torch.zeros(2, 6, device=device)
    with pytest.raises(ValueError, match="not whole 16-byte units of 4"):
        kernels.rms_norm(x, x[0], 1.0, x)
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16"):
        kernels.rms_norm(x, x[0].bfloat16(), 1.0, x)
    with pytest.raises(ValueError, match="gate_up is"):
        kernels.silu_mul(x, x)
    shifted = torch.zeros(2 * 8 + 1, device=device)[1:].view(2, 8)
    with pytest.raises(ValueError, match="does not begin at a multiple of 16 bytes"):
        kernels.rms_norm(shifted, torch.ones(8, device=device), 1.0, shifted)
    wide = torch.zeros(1, 1 << 15, device=device)
    with pytest.raises(ValueError, match="too long for one thread block"):
        kernels.rms_norm(wide, wide[0], 1.0, wide)
