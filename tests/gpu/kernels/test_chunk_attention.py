from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.kernels import chunk_attention, reference
from gpu.team import Team
from tests.gpu.kernels.paged import GEOMETRIES, Float, Geometry, kv_pool, normal, scattered_tables

SMALL = Geometry(4, 2, 32, 16)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    made = Team(3)
    yield made
    made.close()


class Prompt:
    """A sequence whose keys and values are in the pool, and the queries of all its tokens. The rest of its last block is NaN."""

    def __init__(self, geometry: Geometry, context_len: int, *, gain: float = 1.0) -> None:
        size = geometry.block_size
        self.geometry, self.context_len = geometry, context_len
        num_blocks = -(-context_len // size) + 2
        self.pool = kv_pool(geometry, num_blocks, 1)
        self.table = scattered_tables(geometry, [context_len], num_blocks, 2)[0]
        if context_len % size:
            self.pool[self.table[context_len // size], ..., context_len % size :, :] = np.nan
        self.q = gain * normal((context_len, geometry.num_heads, geometry.head_dim), 3)

    def attend(self, start: int, end: int, *, layer: int = 1, team: Team | None = None, twin: bool = False) -> Float:
        """What the chunk [start, end) gets."""
        q = self.q[start:end]
        out = np.full_like(q, np.nan)
        arguments = (q, self.pool, layer, self.table, end, self.geometry.head_dim**-0.5, out)
        if twin:
            reference.chunk_attention(*arguments)
        else:
            chunk_attention(*arguments, team)
        return out

    def check(self, start: int, end: int, *, layer: int = 1, atol: float = 3e-6) -> None:
        found, expected = self.attend(start, end, layer=layer), self.attend(start, end, layer=layer, twin=True)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chunks_around_blocks_and_tiles(geometry: Geometry) -> None:
    size = geometry.block_size
    prompt = Prompt(geometry, 7 * size + 3)
    for start, end in [(0, 1), (0, size), (1, size + 1), (size, 3 * size + 1), (0, 7 * size + 3), (7 * size + 2, 7 * size + 3)]:
        prompt.check(start, end)


def test_a_chunk_of_nothing() -> None:
    assert Prompt(SMALL, 5).attend(5, 5).shape == (0, 4, 32)


@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_is_its_own(layer: int) -> None:
    Prompt(SMALL, 40).check(10, 40, layer=layer)


@settings(max_examples=30, deadline=None)
@given(
    cut=st.tuples(st.integers(0, 60), st.integers(1, 60)),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    block_size=st.integers(1, 20),
)
def test_any_geometry(cut: tuple[int, int], num_kv_heads: int, group: int, head_dim: int, block_size: int) -> None:
    start, length = cut
    Prompt(Geometry(num_kv_heads * group, num_kv_heads, head_dim, block_size), start + length).check(start, start + length)


def test_a_group_of_more_heads_than_a_tile_has_columns() -> None:
    Prompt(Geometry(130, 1, 16, 4), 9).check(2, 9)


def test_large_scores_do_not_overflow() -> None:
    """Scores of a thousand have an error of 1e-4 in float32, and so have their weights."""
    Prompt(SMALL, 100, gain=300.0).check(0, 100, atol=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_how_a_prompt_is_cut_changes_no_bit(geometry: Geometry) -> None:
    prompt = Prompt(geometry, 150)
    whole = prompt.attend(0, 150)
    for step in (1, 16, 37, 100):
        parts = [prompt.attend(start, min(start + step, 150)) for start in range(0, 150, step)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_team_changes_no_bit(team: Team) -> None:
    prompt = Prompt(SMALL, 300)
    np.testing.assert_array_equal(prompt.attend(20, 300, team=team), prompt.attend(20, 300))


def test_what_does_not_fit_is_refused() -> None:
    prompt = Prompt(SMALL, 40)
    q, out = prompt.q[:10], np.empty((10, 4, 32), np.float32)
    with pytest.raises(ValueError, match="out is"):
        chunk_attention(q, prompt.pool, 0, prompt.table, 40, 1.0, out[:9])
    with pytest.raises(ValueError, match="q is"):
        chunk_attention(q[..., :16], prompt.pool, 0, prompt.table, 40, 1.0, out)
    with pytest.raises(ValueError, match="do not divide"):
        chunk_attention(q[:, :3], prompt.pool, 0, prompt.table, 40, 1.0, out[:, :3])
    with pytest.raises(ValueError, match="10 queries cannot be the last of a context of 9"):
        chunk_attention(q, prompt.pool, 0, prompt.table, 9, 1.0, out)
    with pytest.raises(ValueError, match="take 5 blocks and the block table has 4"):
        chunk_attention(q, prompt.pool, 0, prompt.table, 65, 1.0, out)
    with pytest.raises(IndexError, match="block ids"):
        chunk_attention(q, prompt.pool, 0, prompt.table, 49, 1.0, out)
    with pytest.raises(IndexError, match="layer 2"):
        chunk_attention(q, prompt.pool, 2, prompt.table, 40, 1.0, out)
    with pytest.raises(TypeError):
        chunk_attention(q.astype(np.float64), prompt.pool, 0, prompt.table, 40, 1.0, out)
