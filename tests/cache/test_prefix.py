"""Names of blocks: equal exactly where everything that the KV depends on is equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.cache.prefix import block_hashes
from protocol.messages import MMItem
from tests.support.paged import an_item, cells_of, ids, ramp

PLACEHOLDER = 9
Prompt = tuple[list[int], tuple[MMItem, ...]]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Prompts from so few words and images that many share a beginning."""
    token_ids: list[int] = []
    items: list[MMItem] = []
    for part in draw(st.lists(st.sampled_from(["text", "image"]), max_size=5)):
        if part == "text":
            token_ids += draw(st.lists(st.sampled_from([1, 2, PLACEHOLDER]), max_size=3))
        else:
            num_tokens = draw(st.integers(1, 5))
            grid_w = draw(st.sampled_from([4, 8]))
            items.append(MMItem(draw(st.sampled_from(["a", "b"])), len(token_ids), num_tokens, 1, 4, grid_w))
            token_ids += [PLACEHOLDER] * num_tokens
    return token_ids, tuple(items)


@settings(max_examples=400, deadline=None)
@given(one=prompts(), other=prompts(), block_size=st.integers(1, 5))
def test_names_agree_exactly_as_far_as_contents_do(one: Prompt, other: Prompt, block_size: int) -> None:
    names = [block_hashes(ids(*token_ids), items, block_size) for token_ids, items in (one, other)]
    cells = [cells_of(*prompt) for prompt in (one, other)]
    for prompt_names, prompt_cells in zip(names, cells, strict=True):
        assert len(prompt_names) == len(prompt_cells) // block_size
        assert len(set(prompt_names)) == len(prompt_names)
    for block in range(min(len(names[0]), len(names[1]))):
        end = (block + 1) * block_size
        assert (names[0][block] == names[1][block]) == (cells[0][:end] == cells[1][:end])


@settings(max_examples=200, deadline=None)
@given(prompt=prompts(), block_size=st.integers(1, 5), data=st.data())
def test_a_chain_may_be_computed_in_pieces(prompt: Prompt, block_size: int, data: st.DataObject) -> None:
    token_ids, items = prompt
    whole = block_hashes(ids(*token_ids), items, block_size, "salt")
    names: tuple[int, ...] = ()
    for end in sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=4))):
        # What is known of the images does not depend on how much text has come after them.
        images = [item for item in items if item.offset < end]
        names = block_hashes(ids(*token_ids[:end]), images, block_size, "salt", known=names)
    assert block_hashes(ids(*token_ids), items, block_size, "salt", known=names) == whole


def test_salt_and_block_size_separate_caches() -> None:
    tokens = ramp(8)
    chains = [block_hashes(tokens, (), block_size, salt) for block_size in (2, 4) for salt in ("", "a", "b")]
    assert len({name for chain in chains for name in chain}) == 3 * 4 + 3 * 2


def test_names_are_the_same_in_every_process_and_version() -> None:
    tokens = ramp(8)
    assert block_hashes(tokens, [an_item("a", 3, 2)], 4) == GOLDEN


@pytest.mark.parametrize("tokens", [ramp(8).astype("<i4"), ramp(16)[::2], np.arange(8, dtype=np.int64).astype(np.int32)])
def test_any_int32_array_will_do(tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
    assert block_hashes(tokens, (), 4) == block_hashes(ids(*tokens.tolist()), (), 4)


def test_what_is_known_is_taken_over_and_cut_to_the_prompt() -> None:
    tokens = ramp(8)
    assert block_hashes(tokens, (), 4, known=(1, 2, 3)) == (1, 2)
    assert block_hashes(tokens[:3], (), 4) == ()


GOLDEN = (26730460217578625181896636999025181326, 123253255841542153134842128688055482381)
