from __future__ import annotations

import numpy as np
import pytest

from gpu.kernels import reference, silu_mul
from tests.gpu.kernels.paged import normal


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 384), (3, 17), (4, 3072)], ids=str)
def test_it_is_its_reference(shape: tuple[int, int]) -> None:
    gate_up = 4 * normal((shape[0], 2 * shape[1]), 1)
    out, expected = np.empty(shape, np.float32), np.empty(shape, np.float32)
    silu_mul(gate_up, out)
    reference.silu_mul(gate_up, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


def test_gates_of_any_size() -> None:
    gates = np.array([[-1e30, -200, -88, -87, -30, -1e-8, 0, 1e-8, 30, 87, 88, 200, 1e30]], np.float32)
    gate_up = np.concatenate([gates, np.ones_like(gates)], axis=1)
    out, expected = np.empty_like(gates), np.empty_like(gates)
    silu_mul(gate_up, out)
    with np.errstate(over="ignore"):
        reference.silu_mul(gate_up, expected)
    np.testing.assert_allclose(out[0, 1:], expected[0, 1:], rtol=1e-6, atol=1e-30)
    assert np.isfinite(out).all()


def test_halves_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_up is"):
        silu_mul(normal((2, 9), 1), np.empty((2, 4), np.float32))
