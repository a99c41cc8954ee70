"""What stands in for a device's functions in the simulator, where it can be looked at outside of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu.cuda.kernels.simulated import Memory, as_bits, as_float, hashed, load_pair, load_words, pack_bf16, store_words
from gpu.cuda.reference import sum64_rows


def test_bfloat16_is_rounded_like_torch_does() -> None:
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-9, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 1e-40, 0.0, -0.0, float("inf")]
    values = np.array([*ties, *np.random.default_rng(0).standard_normal(1000)], np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    found = [pack_bf16(value, np.float32(0)) for value in values]
    np.testing.assert_array_equal(found, expected)
    assert all(pack_bf16(np.float32(0), value) == int(low) << 16 for value, low in zip(values, found, strict=True))


def test_bits() -> None:
    assert as_float(as_bits(np.float32(-1.5))) == np.float32(-1.5)


def test_the_words_of_a_block_add_up_to_its_sum() -> None:
    block = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 48, np.uint8))
    total = 0
    for unit in range(3):
        low, high = load_pair(Memory(block), unit)
        total += hashed(low, 2 * unit + 1) + hashed(high, 2 * unit + 2)
    assert total % (1 << 64) == int(sum64_rows(block.numpy()[None])[0])


def test_memory_ends_where_its_tensor_does() -> None:
    whole = torch.arange(12, dtype=torch.float32).view(3, 4)
    column = Memory(whole[:2, 1:3])  # its rows lie apart, and what lies between them is its own
    assert column.read(np.float32, 0, 6).tolist() == [1, 2, 3, 4, 5, 6]
    for index in (-1, 6):
        with pytest.raises(IndexError):
            column.read(np.float32, index)
    memory = Memory(whole)
    store_words(memory, 2, load_words(memory, 0))
    assert whole[2].tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        load_words(memory, 3)
