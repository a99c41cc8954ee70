from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.reference import sum64_rows
from tests.gpu.kernels.paged import rng

SIZES = [16, 48, 4096, 32768, 32784, 100_000]  # bytes; 32768 is what one program takes


def random_blocks(num_blocks: int, block_bytes: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.from_numpy(rng(seed).integers(0, 256, (num_blocks, block_bytes), np.uint8)).to(device)


def ids(device: torch.device, *numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def sums_of(rows: Tensor) -> list[int]:
    sums: list[int] = sum64_rows(rows.cpu().numpy()).view(np.int64).tolist()
    return sums


@pytest.mark.parametrize("block_bytes", SIZES)
def test_copy_and_sum(kernels: Kernels, device: torch.device, block_bytes: int) -> None:
    src, dst = random_blocks(4, block_bytes, device), random_blocks(6, block_bytes, device, 2)
    expected = dst.clone()
    expected[[5, 0, 2]] = src[[3, 0, 3]]
    sums = ids(device, 1, 2, 3)
    kernels.copy_blocks(src, ids(device, 3, 0, 3), dst, ids(device, 5, 0, 2), sums)
    assert torch.equal(dst, expected)
    assert sums.tolist() == sums_of(src[[3, 0, 3]])


@pytest.mark.parametrize("block_bytes", SIZES)
def test_sum_alone(kernels: Kernels, device: torch.device, block_bytes: int) -> None:
    src, sums = random_blocks(4, block_bytes, device), ids(device, 1, 2)
    before = src.clone()
    kernels.hash_blocks(src, ids(device, 2, 1), sums)
    assert sums.tolist() == sums_of(src[[2, 1]])
    assert torch.equal(src, before)


def test_copy_alone_and_no_blocks(kernels: Kernels, device: torch.device) -> None:
    src, dst = random_blocks(2, 64, device), random_blocks(2, 64, device, 2)
    kernels.copy_blocks(src, ids(device), dst, ids(device), ids(device))
    kernels.copy_blocks(src, ids(device, 1), dst, ids(device, 0), None)
    assert torch.equal(dst[0], src[1])
    assert torch.equal(dst[1], random_blocks(2, 64, device, 2)[1])


@pytest.mark.parametrize("pair", [(-1, 0), (2, 0), (0, -1), (0, 2), (1 << 40, 0)], ids=str)
def test_ids_out_of_range_copy_nothing(kernels: Kernels, device: torch.device, pair: tuple[int, int]) -> None:
    src, around = random_blocks(2, 64, device), random_blocks(3, 64, device, 2)
    before, sums = around.clone(), ids(device, 7, 7)
    kernels.copy_blocks(src, ids(device, pair[0], 1), around[:2], ids(device, pair[1], 1), sums)
    assert torch.equal(around[1], src[1])
    assert torch.equal(around[[0, 2]], before[[0, 2]])
    assert sums.tolist() == [0, *sums_of(src[1:])]


def test_one_flipped_bit_anywhere_is_seen(kernels: Kernels, device: torch.device) -> None:
    src, sums = random_blocks(3, 40_000, device), ids(device, 0, 0, 0)
    src[1:] = src[0]
    src[1, 39_999] ^= 1
    src[2, 0] ^= 128
    kernels.hash_blocks(src, ids(device, 0, 1, 2), sums)
    assert len(set(sums.tolist())) == 3
