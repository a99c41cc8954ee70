from __future__ import annotations

import numpy as np
import pytest

from gpu.kernels import add_rms_norm, reference, rms_norm
from tests.gpu.kernels.paged import normal

SHAPES = [(0, 8), (1, 1), (1, 128), (3, 7), (5, 1024), (2, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_its_reference(shape: tuple[int, int]) -> None:
    x, weight = 5 * normal(shape, 1), normal(shape[1:], 2)
    out, expected = np.empty_like(x), np.empty_like(x)
    rms_norm(x, weight, 1e-6, out)
    reference.rms_norm(x, weight, 1e-6, expected)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-7)
    rms_norm(x, weight, 1e-6, x)
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_is_its_reference(shape: tuple[int, int]) -> None:
    x, residual, weight = normal(shape, 1), normal(shape, 3), normal(shape[1:], 2)
    out, expected, expected_residual = np.empty_like(x), np.empty_like(x), residual.copy()
    add_rms_norm(x, residual, weight, 1e-5, out)
    reference.add_rms_norm(x, expected_residual, weight, 1e-5, expected)
    np.testing.assert_array_equal(residual, expected_residual)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-7)


def test_zeros_stay_zeros() -> None:
    x = np.zeros((2, 16), np.float32)
    out = np.ones_like(x)
    rms_norm(x, np.ones(16, np.float32), 1e-6, out)
    assert not out.any()


def test_what_does_not_fit_is_refused() -> None:
    x, weight = normal((2, 8), 1), normal((8,), 2)
    with pytest.raises(ValueError, match="out is"):
        rms_norm(x, weight, 1e-6, x[:1])
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, weight[:7], 1e-6, x)
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(x, x[:1], weight, 1e-6, x)
    with pytest.raises(TypeError):
        rms_norm(x.astype(np.float64), weight, 1e-6, x)
