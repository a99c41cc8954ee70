from __future__ import annotations

import numpy as np
import pytest

from gpu.kernels import reference, rope_store
from tests.gpu.kernels.paged import GEOMETRIES, Float, Geometry, kv_pool, normal, rng

SMALL = Geometry(4, 2, 32, 16)


class Case:
    def __init__(self, geometry: Geometry, num_tokens: int) -> None:
        g = geometry
        self.qkv = 3 * normal((num_tokens, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim), 1)
        self.q_weight, self.k_weight = normal((g.head_dim,), 2), normal((g.head_dim,), 3)
        angles = 10 * normal((num_tokens, g.head_dim // 2), 4)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        self.pool = kv_pool(g, 5, 5)
        self.slots = rng(6).permutation(5 * g.block_size)[:num_tokens]
        self.q_out = np.full((num_tokens, g.num_heads, g.head_dim), np.nan, np.float32)

    def run(self, pool: Float, q_out: Float, *, layer: int = 1, twin: bool = False) -> None:
        call = reference.rope_store if twin else rope_store
        call(self.qkv, self.q_weight, self.k_weight, 1e-6, self.cos, self.sin, pool, layer, self.slots, q_out)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_it_is_its_reference(geometry: Geometry, num_tokens: int) -> None:
    case = Case(geometry, num_tokens)
    expected_pool, expected_q = case.pool.copy(), case.q_out.copy()
    case.run(case.pool, case.q_out)
    case.run(expected_pool, expected_q, twin=True)
    np.testing.assert_allclose(case.q_out, expected_q, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(case.pool, expected_pool, rtol=1e-5, atol=2e-6)
    untouched = np.ones(5 * geometry.block_size, bool)
    untouched[case.slots] = False
    by_slot = case.pool.transpose(1, 2, 3, 5, 0, 4).reshape(-1, 5 * geometry.block_size)
    original = kv_pool(geometry, 5, 5).transpose(1, 2, 3, 5, 0, 4).reshape(-1, 5 * geometry.block_size)
    np.testing.assert_array_equal(by_slot[:, untouched], original[:, untouched])


def test_values_are_stored_as_they_are() -> None:
    case = Case(SMALL, 3)
    case.run(case.pool, case.q_out)
    v = case.qkv.reshape(3, 8, 32)[:, 6:]
    for token, slot in enumerate(case.slots):
        np.testing.assert_array_equal(case.pool[slot // 16, 1, 1, :, slot % 16], v[token])


def test_the_batch_around_a_token_changes_no_bit() -> None:
    case = Case(SMALL, 4)
    case.run(case.pool, case.q_out)
    alone, q_alone = case.pool.copy(), np.empty_like(case.q_out[:1])
    for name in ("qkv", "cos", "sin", "slots"):
        setattr(case, name, getattr(case, name)[2:3])
    case.run(alone, q_alone)
    np.testing.assert_array_equal(q_alone[0], case.q_out[2])
    np.testing.assert_array_equal(alone, case.pool)


def test_what_does_not_fit_is_refused() -> None:
    for name, wrong, message in [
        ("qkv", normal((2, 100), 1), "qkv is"),
        ("q_weight", normal((31,), 1), "q_weight is"),
        ("k_weight", normal((31,), 1), "k_weight is"),
        ("cos", normal((2, 32), 1), "cos is"),
        ("sin", normal((1, 16), 1), "sin is"),
        ("slots", np.array([1]), "slots is"),
    ]:
        case = Case(SMALL, 2)
        setattr(case, name, wrong)
        with pytest.raises(ValueError, match=message):
            case.run(case.pool, case.q_out)
    case = Case(SMALL, 2)
    case.slots[1] = 5 * 16
    with pytest.raises(IndexError, match="slots"):
        case.run(case.pool, case.q_out)
    with pytest.raises(IndexError, match="layer"):
        Case(SMALL, 2).run(case.pool, case.q_out, layer=2)
    odd = Geometry(1, 1, 3, 4)
    with pytest.raises(ValueError, match="no halves"):
        Case(odd, 1).run(kv_pool(odd, 5, 5), np.empty((1, 1, 3), np.float32))
