from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from gpu.kernels import choose_experts, reference
from tests.gpu.kernels.paged import normal

Float = npt.NDArray[np.float32]


def choose(logits: Float, num_chosen: int, *, normalizes: bool) -> tuple[npt.NDArray[np.int64], Float]:
    chosen, shares = np.empty((len(logits), num_chosen), np.int64), np.empty((len(logits), num_chosen), np.float32)
    choose_experts(logits.copy(), normalizes, chosen, shares)
    return chosen, shares


@pytest.mark.parametrize("normalizes", [False, True], ids=["", "normalizes"])
@pytest.mark.parametrize("size", [(0, 4, 2), (1, 1, 1), (1, 5, 5), (7, 8, 2), (3, 128, 8), (2, 60, 4)], ids=str)
def test_it_is_its_reference(size: tuple[int, int, int], normalizes: bool) -> None:
    num_rows, num_experts, num_chosen = size
    logits = 5 * normal((num_rows, num_experts), 1)
    chosen, shares = np.empty((num_rows, num_chosen), np.int64), np.empty((num_rows, num_chosen), np.float32)
    reference.choose_experts(logits, normalizes, chosen, shares)
    ours, our_shares = choose(logits, num_chosen, normalizes=normalizes)
    np.testing.assert_array_equal(ours, chosen)
    np.testing.assert_allclose(our_shares, shares, rtol=1e-5)


def test_of_equal_ones_the_lower() -> None:
    chosen, shares = choose(np.array([[1, 3, 3, 0, 3, 1]], np.float32), 4, normalizes=True)
    np.testing.assert_array_equal(chosen, [[1, 2, 4, 0]])
    np.testing.assert_allclose(shares, [np.exp([3, 3, 3, 1]) / np.exp([3, 3, 3, 1]).sum()], rtol=1e-5)


def test_a_row_that_is_no_number_still_chooses_experts() -> None:
    chosen, _ = choose(np.full((1, 4), np.nan, np.float32), 2, normalizes=True)
    assert np.isin(chosen, range(4)).all()


def test_what_does_not_fit_is_refused() -> None:
    logits, chosen = normal((2, 4), 1), np.empty((2, 5), np.int64)
    with pytest.raises(ValueError, match="5 of 4 experts"):
        choose_experts(logits, True, chosen, np.empty((2, 5), np.float32))
    with pytest.raises(ValueError, match="shares is"):
        choose_experts(logits, True, chosen[:, :2], np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="logits is"):
        choose_experts(logits, True, np.empty((3, 2), np.int64), np.empty((3, 2), np.float32))
