from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.triton import experts as module
from tests.gpu.cuda.triton.cases.inputs import assert_close, normal


@dataclass(frozen=True)
class Size:
    rows: int
    width: int
    inner: int
    experts: int
    chosen: int


# Each size and dtype has kernels of its own, and a device takes a second to compile one.
IS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
EDGES = [
    Size(0, 32, 16, 4, 2),
    Size(1, 32, 16, 4, 1),
    Size(1, 64, 24, 8, 8),
    Size(3, 40, 17, 5, 3),  # nothing is a power of two, nor a multiple of 8
    Size(17, 136, 72, 6, 2),  # more than one tile of columns, and a tile of rows that is not full
    Size(90, 32, 16, 3, 2),
    Size(150, 48, 40, 2, 1),
]
QWEN3_VL_30B = [Size(1, 2048, 768, 128, 8), Size(300, 2048, 768, 128, 8)]
SIZES = EDGES if IS_INTERPRETER else [EDGES[3], EDGES[4], *QWEN3_VL_30B]


def run(kernels: Kernels, twin: Kernels, size: Size, dtype: torch.dtype, device: torch.device, *, turned: bool) -> None:
    x, gate_up, down = weights(size, dtype, device, turned=turned)
    logits = 2 * normal((size.rows, size.experts), torch.float32, device, 4)
    for normalizes in (True, False):
        out, expected = torch.full_like(x, torch.nan), torch.empty_like(x)
        kernels.experts(x, logits, gate_up, down, size.chosen, normalizes, out)
        twin.experts(x, logits, gate_up, down, size.chosen, normalizes, expected)
        assert_close(out, expected)


def weights(size: Size, dtype: torch.dtype, device: torch.device, *, turned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = normal((size.rows, size.width), dtype, device, 1)
    gate_up = normal((size.experts, 2 * size.inner, size.width), dtype, device, 2) / size.width**0.5
    down = normal((size.experts, size.width, size.inner), dtype, device, 3) / size.inner**0.5
    if turned:
        gate_up, down = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (gate_up, down))
    return x, gate_up, down


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_experts(
    kernels: Kernels, twin: Kernels, device: torch.device, main_dtype: torch.dtype, size: Size, turned: bool
) -> None:
    run(kernels, twin, size, main_dtype, device, turned=turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if IS_INTERPRETER else [torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", module.SHAPES, ids=str)
def test_every_shape_of_tile(
    kernels: Kernels,
    twin: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    shape: module._Shape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SHAPES", (shape,))
    run(kernels, twin, Size(37, 72, 24, 5, 2), dtype, device, turned=shape.rows > 32)


def test_all_rows_may_choose_the_same(kernels: Kernels, twin: Kernels, device: torch.device, main_dtype: torch.dtype) -> None:
    """The last expert and the first one, and nobody the others."""
    size = Size(50, 32, 16, 7, 2)
    x, gate_up, down = weights(size, main_dtype, device)
    logits = torch.zeros((size.rows, size.experts), device=device)
    logits[:, 6], logits[:, 0] = 2.0, 1.0
    out, expected = torch.empty_like(x), torch.empty_like(x)
    kernels.experts(x, logits, gate_up, down, 2, True, out)
    twin.experts(x, logits, gate_up, down, 2, True, expected)
    assert_close(out, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is not a number
def test_a_row_does_not_depend_on_the_others(kernels: Kernels, device: torch.device, main_dtype: torch.dtype) -> None:
    """To the last bit while the tiles have one shape; one that is not a number spoils itself alone."""
    size = Size(12, 64, 32, 4, 2)
    x, gate_up, down = weights(size, main_dtype, device)
    logits = normal((size.rows, size.experts), torch.float32, device, 4)
    out, shuffled = torch.empty_like(x), torch.empty_like(x)
    kernels.experts(x, logits, gate_up, down, 2, True, out)
    order = torch.arange(size.rows, device=device).flip(0)
    spoilt, other = x[order], logits[order]
    spoilt[3], other[3] = torch.nan, torch.nan
    kernels.experts(spoilt, other, gate_up, down, 2, True, shuffled)
    kept = torch.arange(size.rows, device=device) != 3
    assert torch.equal(shuffled[kept], out[order][kept])
    assert shuffled[3].isnan().all()


def test_of_equal_ones_the_lower(kernels: Kernels, device: torch.device) -> None:
    x, gate_up, down = weights(Size(2, 32, 16, 6, 2), torch.float32, device)
    out, expected = torch.empty_like(x), torch.empty_like(x)
    kernels.experts(x, torch.zeros((2, 6), device=device), gate_up, down, 2, True, out)
    kernels.experts(x, torch.tensor([[1.0, 1.0, 0, 0, 0, 0]] * 2, device=device), gate_up, down, 2, True, expected)
    assert torch.equal(out, expected)


def test_bad_arguments_launch_nothing(kernels: Kernels, device: torch.device) -> None:
    x, gate_up, down = weights(Size(2, 32, 16, 6, 2), torch.float32, device)
    logits, out = torch.zeros((2, 6), device=device), torch.zeros_like(x)
    with pytest.raises(ValueError, match="7 of 6 experts"):
        kernels.experts(x, logits, gate_up, down, 7, True, out)
    with pytest.raises(ValueError, match="gate_up is"):
        kernels.experts(x, logits, gate_up[:5], down, 2, True, out)
    with pytest.raises(ValueError, match="down is"):
        kernels.experts(x, logits, gate_up, down[:, :31], 2, True, out)
    with pytest.raises(TypeError, match="logits"):
        kernels.experts(x, logits.bfloat16(), gate_up, down, 2, True, out)
    with pytest.raises(TypeError, match="one expert's down"):
        kernels.experts(x, logits, gate_up, down.bfloat16(), 2, True, out)
    with pytest.raises(ValueError, match="one expert's gate_up"):
        kernels.experts(x, logits, torch.zeros((6, 32, 64), device=device)[:, :, ::2], down, 2, True, out)
    assert not out.any()
