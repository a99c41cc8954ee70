from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import FusedLinear
from gpu.cuda.reference import TorchFusedLinear
from gpu.cuda.triton.fused_linear import Tile, TritonFusedLinear
from tests.gpu.cuda.triton.cases.inputs import assert_close, is_exact, normal

SIZES = [(0, 64, 8), (1, 16, 1), (1, 64, 6), (2, 96, 33), (3, 1000, 5), (4, 1024, 12), (1, 2500, 130)]
TWIN = TorchFusedLinear()


@pytest.fixture(params=[None, Tile(8, 32)], ids=["default", "other"])
def fused(request: pytest.FixtureRequest) -> FusedLinear:
    return TritonFusedLinear(request.param, request.param) if request.param else TritonFusedLinear()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("is_wider", [False, True])
def test_norm_linear(
    fused: FusedLinear, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], is_wider: bool
) -> None:
    num_rows, width, num_columns = size
    x, norm = 5 * normal((num_rows, width), dtype, device, 1), normal((width,), dtype, device, 2)
    weight = normal((num_columns, width), dtype, device, 3) / width**0.5
    out = torch.full((num_rows, num_columns), torch.nan, dtype=torch.float32 if is_wider else dtype, device=device)
    expected = torch.empty_like(out)
    fused.norm_linear(x, norm, 1e-6, weight, out)
    TWIN.norm_linear(x, norm, 1e-6, weight, expected)
    assert_close(out, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm_silu_mul(fused: FusedLinear, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    num_rows, width, num_columns = size
    x, norm = normal((num_rows, width), dtype, device, 1), normal((width,), dtype, device, 2)
    weight = normal((2 * num_columns, width), dtype, device, 3) / width**0.5
    out = torch.full((num_rows, num_columns), torch.nan, dtype=dtype, device=device)
    expected = torch.empty_like(out)
    fused.norm_silu_mul(x, norm, 1e-6, weight, out)
    TWIN.norm_silu_mul(x, norm, 1e-6, weight, expected)
    assert_close(out, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_add(fused: FusedLinear, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    num_rows, width, num_columns = size
    x, out = normal((num_rows, width), dtype, device, 1), 3 * normal((num_rows, num_columns), dtype, device, 2)
    weight = normal((num_columns, width), dtype, device, 3) / width**0.5
    expected = out.clone()
    TWIN.linear_add(x, weight, expected)
    fused.linear_add(x, weight, out)
    assert_close(out, expected)


def test_eps_counts_where_a_row_is_small(fused: FusedLinear, device: torch.device) -> None:
    x, norm = 1e-4 * normal((2, 64), torch.float32, device, 1), normal((64,), torch.float32, device, 2)
    weight, out = normal((8, 64), torch.float32, device, 3), torch.empty(2, 8, device=device)
    expected = torch.empty_like(out)
    fused.norm_linear(x, norm, 1e-5, weight, out)
    TWIN.norm_linear(x, norm, 1e-5, weight, expected)
    assert_close(out, expected)


def test_a_result_is_rounded_once(fused: FusedLinear, device: torch.device) -> None:
    """What is added would be 0.5, rounded to bfloat16, and 128.5 would be 128."""
    if not is_exact(device, torch.bfloat16):
        return
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    weight, out = torch.zeros_like(x), torch.full((1, 1), 128.0, dtype=torch.bfloat16, device=device)
    weight[0, 3], weight[0, 60] = 0.5, 2.0**-10
    fused.linear_add(x, weight, out)
    assert out.item() == 129.0


def test_bad_arguments_launch_nothing(fused: FusedLinear, device: torch.device) -> None:
    x, weight = normal((2, 64), torch.float32, device, 1), normal((6, 64), torch.float32, device, 2)
    out = torch.zeros(2, 6, device=device)
    with pytest.raises(ValueError, match="5 rows"):
        fused.linear_add(x[:1].repeat(5, 1), weight, out[:1].repeat(5, 1))
    with pytest.raises(ValueError, match="weight"):
        fused.linear_add(x, weight[:5], out)
    with pytest.raises(ValueError, match="weight"):
        fused.norm_silu_mul(x, x[0], 1e-6, weight, out)
    with pytest.raises(ValueError, match="norm"):
        fused.norm_linear(x, x[0, :32], 1e-6, weight, out)
    with pytest.raises(TypeError, match="out"):
        fused.linear_add(x, weight, out.bfloat16())
    assert not out.any()
