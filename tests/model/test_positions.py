"""Positions against transformers' get_rope_index, and the position after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd.model.positions import mrope_next, mrope_positions
from protocol.messages import MMItem
from tests.model.reference import IMAGE_TOKEN, VL_NAMES, Model

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def test_text_counts_up_in_all_three() -> None:
    np.testing.assert_array_equal(mrope_positions(4, (), 2), [[0, 1, 2, 3]] * 3)
    assert mrope_next(4, (), 2) == 4


def test_an_image_between_text() -> None:
    items = (MMItem("a", 2, 6, 1, 4, 6),)  # 2 x 3 tokens
    np.testing.assert_array_equal(
        mrope_positions(9, items, 2),
        [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]],
    )
    assert mrope_next(9, items, 2) == 6


@given(st.integers(0, 5), st.lists(st.tuples(grids, st.integers(1, 4)), max_size=4), st.integers(1, 3))
def test_what_comes_after_goes_on_from_the_highest(start: int, images: list[tuple[tuple[int, int], int]], merge: int) -> None:
    items: list[MMItem] = []
    length = start
    for (rows, columns), gap in images:
        items.append(MMItem("a", length, rows * columns, 1, rows * merge, columns * merge))
        length += rows * columns + gap
    positions = mrope_positions(length, items, merge)
    assert positions.shape == (3, length)
    assert positions.dtype == np.int32
    assert mrope_next(length, items, merge) == positions.max(initial=-1) + 1
    # A longer prompt begins with the same positions.
    np.testing.assert_array_equal(mrope_positions(length + 3, items, merge)[:, :length], positions)


@pytest.mark.parametrize("name", VL_NAMES)
def test_equal_those_of_transformers(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    assert model.config.vision is not None
    prompt = model.prompt(seed=2, length=7)
    token_ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
    expected, deltas = model.reference.model.get_rope_index(
        token_ids,
        mm_token_type_ids=(token_ids == IMAGE_TOKEN).int(),
        image_grid_thw=torch.tensor([(i.grid_t, i.grid_h, i.grid_w) for i in prompt.items]),
    )
    merge = model.config.vision.merge_size
    np.testing.assert_array_equal(mrope_positions(len(prompt.token_ids), prompt.items, merge), expected[:, 0].numpy())
    assert mrope_next(len(prompt.token_ids), prompt.items, merge) == len(prompt.token_ids) + int(deltas[0, 0])
