from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.kernels import gather_kv, reference, store_kv
from tests.gpu.kernels.paged import GEOMETRIES, Geometry, kv_pool, normal, rng, scattered_tables

SMALL = Geometry(4, 2, 32, 16)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_store_kv_is_its_reference(geometry: Geometry, num_tokens: int) -> None:
    pool = kv_pool(geometry, 9, 1)
    expected = pool.copy()
    k, v = (normal((num_tokens, geometry.num_kv_heads, geometry.head_dim), seed) for seed in (2, 3))
    slots = rng(4).permutation(9 * geometry.block_size)[:num_tokens]
    store_kv(k, v, pool, 1, slots)
    reference.store_kv(k, v, expected, 1, slots)
    np.testing.assert_array_equal(pool, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gather_kv_is_its_reference(geometry: Geometry) -> None:
    size = geometry.block_size
    for num_tokens in sorted({0, 1, size - 1, size, size + 1, 3 * size + 2}):
        pool = kv_pool(geometry, 9, 1)
        table = scattered_tables(geometry, [num_tokens], 9, 2)[0]
        found = np.full((2, geometry.num_kv_heads, num_tokens, geometry.head_dim), np.nan, np.float32)
        expected = found.copy()
        gather_kv(pool, 0, table, num_tokens, found[0], found[1])
        reference.gather_kv(pool, 0, table, num_tokens, expected[0], expected[1])
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(0, 40), head_dim=st.integers(1, 20), block_size=st.integers(1, 9))
def test_what_is_stored_is_gathered(num_tokens: int, head_dim: int, block_size: int) -> None:
    geometry = Geometry(2, 2, head_dim, block_size)
    pool = kv_pool(geometry, 50, 1)
    table = scattered_tables(geometry, [num_tokens], 50, 2)[0]
    k, v = (normal((num_tokens, 2, head_dim), seed) for seed in (3, 4))
    places = np.arange(num_tokens)
    store_kv(k, v, pool, 1, table[places // block_size].astype(np.int64) * block_size + places % block_size)
    k_out, v_out = np.empty((2, num_tokens, head_dim), np.float32), np.empty((2, num_tokens, head_dim), np.float32)
    gather_kv(pool, 1, table, num_tokens, k_out, v_out)
    np.testing.assert_array_equal(k_out, k.transpose(1, 0, 2))
    np.testing.assert_array_equal(v_out, v.transpose(1, 0, 2))


@pytest.mark.parametrize("slot", [-1, 9 * 16])
def test_a_slot_outside_of_the_pool_is_refused(slot: int) -> None:
    pool, k = kv_pool(SMALL, 9, 1), normal((2, 2, 32), 2)
    before = pool.copy()
    with pytest.raises(IndexError, match="slots"):
        store_kv(k, k, pool, 0, np.array([0, slot]))
    np.testing.assert_array_equal(pool, before)


def test_what_does_not_fit_is_refused() -> None:
    pool, k, slots = kv_pool(SMALL, 9, 1), normal((2, 2, 32), 2), np.array([0, 1])
    out = np.empty((2, 20, 32), np.float32)
    table = np.array([0, 1], np.int32)
    with pytest.raises(ValueError, match="k is"):
        store_kv(k[:1], k, pool, 0, slots)
    with pytest.raises(ValueError, match="v is"):
        store_kv(k, k[:, :1], pool, 0, slots)
    with pytest.raises(IndexError, match="layer"):
        store_kv(k, k, pool, -1, slots)
    with pytest.raises(TypeError):
        store_kv(k.astype(np.float64), k, pool, 0, slots)
    with pytest.raises(ValueError, match="take 2 blocks and the block table has 1"):
        gather_kv(pool, 0, table[:1], 20, out, out)
    with pytest.raises(ValueError, match="v_out is"):
        gather_kv(pool, 0, table, 20, out, out[:, :19])
    with pytest.raises(IndexError, match="block ids"):
        gather_kv(pool, 0, np.array([0, 9], np.int32), 20, out, out)
