from __future__ import annotations

import numpy as np
import pytest

from gpu.kernels import mix_rows, reference
from tests.gpu.kernels.paged import normal, rng


@pytest.mark.parametrize("size", [(0, 2, 8), (1, 1, 1), (3, 2, 17), (5, 8, 256)], ids=str)
def test_it_is_its_reference(size: tuple[int, int, int]) -> None:
    num_rows, num_parts, width = size
    rows, shares = normal((num_rows * num_parts, width), 1), normal((num_rows, num_parts), 2)
    places = rng(3).permutation(num_rows * num_parts).reshape(num_rows, num_parts)
    out, expected = np.full((num_rows, width), np.nan, np.float32), np.empty((num_rows, width), np.float32)
    mix_rows(rows, places, shares, out)
    reference.mix_rows(rows, places, shares, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_there_are_refused() -> None:
    rows, out = normal((4, 8), 1), np.zeros((1, 8), np.float32)
    for place in (-1, 4):
        with pytest.raises(IndexError, match="not all among 4"):
            mix_rows(rows, np.array([[0, place]]), np.ones((1, 2), np.float32), out)
    with pytest.raises(ValueError, match="shares is"):
        mix_rows(rows, np.array([[0, 1]]), np.ones((1, 3), np.float32), out)
    with pytest.raises(ValueError, match="out is"):
        mix_rows(rows, np.array([[0, 1]]), np.ones((1, 2), np.float32), np.zeros((2, 8), np.float32))
    assert not out.any()
