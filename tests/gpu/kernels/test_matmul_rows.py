"""matmul_rows against NumPy, and its promise that a row's result does not depend on the other rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from gpu.kernels.matmul_rows import matmul_rows


def _random(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 31, 130])
@pytest.mark.parametrize(("num_outputs", "width"), [(1, 16), (5, 7), (6, 32), (7, 40), (97, 33), (64, 128)])
def test_is_the_matrix_product(num_rows: int, num_outputs: int, width: int) -> None:
    x, weight = _random(1, num_rows, width), _random(2, num_outputs, width)
    out = np.full((num_rows, num_outputs), np.nan, np.float32)
    matmul_rows(x, weight, out)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weight.T.astype(np.float64), atol=1e-5 * width)


def test_writes_only_its_columns() -> None:
    x, weight = _random(1, 9, 24), _random(2, 10, 24)
    out = np.full((9, 15), 7, np.float32)
    matmul_rows(x, weight, out, column=3)
    np.testing.assert_allclose(out[:, 3:13], x @ weight.T, atol=1e-4)
    assert (out[:, :3] == 7).all()
    assert (out[:, 13:] == 7).all()


@pytest.mark.parametrize("width", [16, 50, 3000])
def test_a_row_is_the_same_alone_and_in_any_batch(width: int) -> None:
    x, weight = _random(1, 140, width), _random(2, 20, width)
    together = np.empty((140, 20), np.float32)
    matmul_rows(x, weight, together)
    for num_rows in (1, 2, 3, 6, 7):
        for first in (0, 5, 127):
            some = np.empty((num_rows, 20), np.float32)
            matmul_rows(np.ascontiguousarray(x[first : first + num_rows]), weight, some)
            np.testing.assert_array_equal(some, together[first : first + num_rows])


def test_an_output_is_the_same_in_any_slice_of_the_matrix() -> None:
    x, weight = _random(1, 5, 64), _random(2, 30, 64)
    whole = np.empty((5, 30), np.float32)
    matmul_rows(x, weight, whole)
    for first, last in ((0, 1), (3, 8), (11, 30)):
        part = np.empty((5, last - first), np.float32)
        matmul_rows(x, weight[first:last], part)
        np.testing.assert_array_equal(part, whole[:, first:last])


@pytest.mark.parametrize(
    ("x", "weight", "out"),
    [
        (np.zeros((2, 4), np.float32), np.zeros((3, 5), np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros((1, 3), np.float32)),
        (np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros((2, 2), np.float32)),
        (np.zeros((2, 4), np.float64), np.zeros((3, 4), np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((4, 2), np.float32).T, np.zeros((3, 4), np.float32), np.zeros((2, 3), np.float32)),
    ],
)
def test_refuses_what_does_not_fit(
    x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
) -> None:
    with pytest.raises(ValueError, match=r"must be|is |do not fit"):
        matmul_rows(x, weight, out)
