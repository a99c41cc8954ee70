from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.reference import sum64_rows
from tests.gpu.cuda.kernels.cases.inputs import on_device_too
from tests.gpu.kernels.paged import rng

# in units of 16 bytes: one; less than a thread block takes, and no power of two; more than it takes at a time; several times that
UNITS = on_device_too([1, 3, 16, 40, 150, 300], [2048, 2049, 147456])


def blocks_of(num_blocks: int, units: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rng(units).integers(0, 256, (num_blocks, 16 * units), np.uint8)).to(device)


def ids_of(*ids: int, device: torch.device) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def expected_sums(src: Tensor, *ids: int) -> list[int]:
    return [int(sum64_rows(src[i : i + 1].cpu().numpy())[0]) if 0 <= i < len(src) else 0 for i in ids]


def unsigned(sums: Tensor) -> list[int]:
    return [each % (1 << 64) for each in sums.tolist()]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("has_sums", [True, False])
def test_copy(kernels: Kernels, device: torch.device, units: int, has_sums: bool) -> None:
    src, dst = blocks_of(6, units, device), torch.zeros((5, 16 * units), dtype=torch.uint8, device=device)
    sums = torch.full((3,), 7, dtype=torch.int64, device=device) if has_sums else None
    kernels.copy_blocks(src, ids_of(5, 0, 3, device=device), dst, ids_of(1, 4, 0, device=device), sums)
    assert torch.equal(dst[[1, 4, 0]], src[[5, 0, 3]])
    assert not dst[[2, 3]].any()
    if sums is not None:
        assert unsigned(sums) == expected_sums(src, 5, 0, 3)


@pytest.mark.parametrize("units", UNITS)
def test_hash(kernels: Kernels, device: torch.device, units: int) -> None:
    src, sums = blocks_of(4, units, device), torch.full((5,), -1, dtype=torch.int64, device=device)
    before = src.clone()
    kernels.hash_blocks(src, ids_of(3, 3, 0, 4, -1, device=device), sums)
    assert unsigned(sums) == expected_sums(src, 3, 3, 0, 4, -1)
    assert torch.equal(src, before)


@pytest.mark.parametrize("units", [3, 40])
def test_ids_out_of_range_copy_nothing(kernels: Kernels, device: torch.device, units: int) -> None:
    src, dst = blocks_of(3, units, device), torch.zeros((2, 16 * units), dtype=torch.uint8, device=device)
    sums = torch.full((5,), 7, dtype=torch.int64, device=device)
    src_ids, dst_ids = ids_of(0, 3, -1, 1, 1 << 60, device=device), ids_of(2, 0, 0, 1, 0, device=device)
    kernels.copy_blocks(src, src_ids, dst, dst_ids, sums)
    assert torch.equal(dst[1], src[1])
    assert not dst[0].any()
    assert unsigned(sums) == [0, 0, 0, *expected_sums(src, 1), 0]


def test_many_small_blocks(kernels: Kernels, device: torch.device) -> None:
    src, dst = blocks_of(50, 2, device), torch.zeros((50, 32), dtype=torch.uint8, device=device)
    order = torch.from_numpy(rng(1).permutation(50)).to(device)
    sums = torch.zeros(50, dtype=torch.int64, device=device)
    kernels.copy_blocks(src, order, dst, torch.arange(50, device=device), sums)
    assert torch.equal(dst, src[order])
    assert unsigned(sums) == expected_sums(src, *order.tolist())


def test_no_blocks(kernels: Kernels, device: torch.device) -> None:
    src, none = blocks_of(2, 3, device), ids_of(device=device)
    kernels.copy_blocks(src, none, src, none, none)
    kernels.hash_blocks(src, none, none)


def test_what_does_not_fit_is_refused(kernels: Kernels, device: torch.device) -> None:
    src, one = blocks_of(2, 3, device), ids_of(0, device=device)
    with pytest.raises(ValueError, match="blocks of 48 bytes do not fit into blocks of 64"):
        kernels.copy_blocks(src, one, blocks_of(2, 4, device), one, None)
    with pytest.raises(TypeError, match=r"src_ids is torch\.int32"):
        kernels.copy_blocks(src, one.int(), src, one, None)
    with pytest.raises(ValueError, match="no multiple of 16"):
        kernels.hash_blocks(src[:, :40].contiguous(), one, one)
