from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.triton.cases.inputs import assert_close, is_exact, normal

SIZES = [(0, 64), (1, 1), (1, 128), (3, 96), (2, 4096), (5, 5000)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_rms_norm(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = normal(shape, dtype, device, 1), normal(shape[1:], dtype, device, 2)
    out, expected = torch.full_like(x, torch.nan), torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, out)
    twin.rms_norm(x, weight, 1e-6, expected)
    assert_close(out, expected)
    kernels.rms_norm(x, weight, 1e-6, x)
    assert_close(x, expected)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_add_rms_norm(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    delta, weight = normal(shape, dtype, device, 1), normal(shape[1:], dtype, device, 2)
    x = 30 * normal(shape, dtype, device, 3)
    expected_x, expected = x.clone(), torch.empty_like(x)
    twin.add_rms_norm(delta, expected_x, weight, 1e-6, expected)
    kernels.add_rms_norm(delta, x, weight, 1e-6, delta)  # `out` may be `delta`
    if is_exact(device, dtype):
        assert torch.equal(x, expected_x)
    assert_close(x, expected_x)
    assert_close(delta, expected)


def test_eps_counts_where_a_row_is_small(kernels: Kernels, twin: Kernels, device: torch.device) -> None:
    x, weight = 1e-4 * normal((2, 64), torch.float32, device, 1), normal((64,), torch.float32, device, 2)
    out, expected = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-5, out)
    twin.rms_norm(x, weight, 1e-5, expected)
    assert_close(out, expected)


def test_bad_arguments_launch_nothing(kernels: Kernels, device: torch.device) -> None:
    x = normal((2, 64), torch.float32, device, 1)
    with pytest.raises(ValueError, match="weight"):
        kernels.rms_norm(x, x[0, :32], 1e-6, x)
    with pytest.raises(TypeError, match="out"):
        kernels.rms_norm(x, x[0], 1e-6, x.bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.rms_norm(x[:, ::2], x[0, :32], 1e-6, x[:, :32].contiguous())
