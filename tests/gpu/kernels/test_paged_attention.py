from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.kernels import paged_attention, reference
from gpu.team import Team
from tests.gpu.kernels.paged import GEOMETRIES, Float, Geometry, kv_pool, normal, scattered_tables

SMALL = Geometry(4, 2, 32, 16)
NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(3)
    yield made
    made.close()


def attend(geometry: Geometry, context_lens: list[int], *, team: Team | None = None, layer: int = 1, gain: float = 1.0) -> Float:
    """The kernel's answer, after it was compared with the reference."""
    num_blocks = sum(-(-length // geometry.block_size) for length in context_lens) + 2
    q = gain * normal((len(context_lens), geometry.num_heads, geometry.head_dim), 1)
    pool = kv_pool(geometry, num_blocks, 2)
    tables = scattered_tables(geometry, context_lens, num_blocks, 3)
    lens = np.array(context_lens, np.int32)
    out, expected = np.full_like(q, np.nan), np.full_like(q, np.nan)
    paged_attention(q, pool, layer, tables, lens, geometry.head_dim**-0.5, out, team)
    reference.paged_attention(q, pool, layer, tables, lens, geometry.head_dim**-0.5, expected)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_context_lengths_around_a_block(geometry: Geometry) -> None:
    size = geometry.block_size
    attend(geometry, [0, 1, size - 1, size, size + 1, 2 * size, 5 * size + 3])


@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_is_its_own(layer: int) -> None:
    attend(SMALL, [33, 5], layer=layer)


@settings(max_examples=40, deadline=None)
@given(
    context_lens=st.lists(st.integers(0, 70), min_size=0, max_size=5),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    block_size=st.integers(1, 20),
)
def test_any_geometry(context_lens: list[int], num_kv_heads: int, group: int, head_dim: int, block_size: int) -> None:
    attend(Geometry(num_kv_heads * group, num_kv_heads, head_dim, block_size), context_lens)


def test_large_scores_do_not_overflow() -> None:
    attend(SMALL, [1, 40, 100], gain=300.0)


def test_a_context_of_thousands() -> None:
    attend(SMALL, [4099])


@pytest.mark.parametrize("context_lens", [[3000], [2000, 0, 1, 700, 65], [40] * 40])
def test_a_team_changes_no_bit(team: Team, context_lens: list[int]) -> None:
    np.testing.assert_array_equal(attend(SMALL, context_lens), attend(SMALL, context_lens, team=team))


def test_the_batch_around_a_sequence_changes_no_bit() -> None:
    pool, q = kv_pool(SMALL, NUM_BLOCKS, 2), normal((3, 4, 32), 1)
    tables = scattered_tables(SMALL, [100, 33, 7], NUM_BLOCKS, 3)
    lens = np.array([100, 33, 7], np.int32)
    together = np.empty_like(q)
    paged_attention(q, pool, 0, tables, lens, 0.2, together)
    for i in range(3):
        alone = np.empty_like(q[i : i + 1])
        paged_attention(q[i : i + 1], pool, 0, tables[i : i + 1], lens[i : i + 1], 0.2, alone)
        np.testing.assert_array_equal(alone[0], together[i])


class TestRefusals:
    @pytest.fixture(autouse=True)
    def arrange(self) -> None:
        self.q = normal((2, 4, 32), 1)
        self.pool = kv_pool(SMALL, NUM_BLOCKS, 2)
        self.tables = scattered_tables(SMALL, [20, 30], NUM_BLOCKS, 3)
        self.lens = np.array([20, 30], np.int32)

    def run(self, layer: int = 0, team: Team | None = None) -> None:
        paged_attention(self.q, self.pool, layer, self.tables, self.lens, 1.0, np.empty_like(self.q), team)

    @pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS, 1 << 30])
    def test_a_block_that_the_pool_does_not_have(self, block_id: int) -> None:
        self.tables[1, 1] = block_id
        with pytest.raises(IndexError, match="sequence 1"):
            self.run()

    @pytest.mark.parametrize("context_len", [-1, 16 * 3 + 1])
    def test_a_context_that_the_table_does_not_cover(self, context_len: int) -> None:
        self.lens[0] = context_len
        with pytest.raises(IndexError, match="sequence 0"):
            self.run()

    def test_an_error_on_any_thread_of_a_team(self, team: Team) -> None:
        self.q, self.lens = normal((40, 4, 32), 1), np.full(40, 1600, np.int32)
        self.tables = np.zeros((40, 100), np.int32)
        self.tables[17, 99] = NUM_BLOCKS
        with pytest.raises(IndexError, match="sequence 17"):
            self.run(team=team)

    def test_a_layer_that_the_pool_does_not_have(self) -> None:
        with pytest.raises(IndexError, match="layer 2"):
            self.run(layer=2)

    def test_shapes_that_do_not_fit(self) -> None:
        for q in (normal((3, 4, 32), 1), normal((2, 3, 32), 1), normal((2, 4, 16), 1)):
            self.q = q
            with pytest.raises(ValueError, match=r"is \(|divide"):
                self.run()
        self.q, self.tables = normal((2, 4, 32), 1), self.tables[:1]
        with pytest.raises(ValueError, match="1 block tables for 2"):
            self.run()

    def test_other_types_and_strides(self) -> None:
        self.tables = np.asfortranarray(self.tables)
        with pytest.raises(TypeError):
            self.run()
