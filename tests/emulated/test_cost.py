from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.emulated.cost import TextWork, at, encode_s, text_s, text_work
from tests.emulated.profiles import PROFILE

CURVE = ((10.0, 1.0), (20.0, 1.0), (40.0, 3.0))


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1.0), (10, 1.0), (15, 1.0), (20, 1.0), (30, 2.0), (40, 3.0), (60, 5.0)])
def test_a_curve_is_straight_between_and_past_its_points(amount: float, seconds: float) -> None:
    assert at(CURVE, amount) == pytest.approx(seconds)


def test_a_curve_never_says_less_than_nothing() -> None:
    assert at(((10.0, 1.0), (20.0, 9.0)), 1) == 0.0


def test_work_counts_rows_pairs_and_context() -> None:
    # a chunk of 3 after 10: each new token sees those before it and itself, 11 + 12 + 13; two sequences with one new token
    assert text_work([(3, 10), (1, 7), (1, 0)]) == TextWork(num_rows=5, num_pairs=36, num_context=9)


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 60))), st.integers(1, 39))
def test_chunks_of_a_prompt_have_the_pairs_of_the_whole(prompts: list[tuple[int, int]], cut: int) -> None:
    for num_new, before in prompts:
        if 1 < cut < num_new - 1:
            parts = text_work([(cut, before)]) + text_work([(num_new - cut, before + cut)])
            assert parts == text_work([(num_new, before)])


def test_a_step_costs_its_rows_its_pairs_and_its_context() -> None:
    assert text_s(PROFILE, TextWork(150, 1000, 100)) == pytest.approx(0.015 + 0.001 + 0.001)
    assert text_s(PROFILE, TextWork()) == 0.0


def test_a_fused_step_costs_less_than_two() -> None:
    chunk, tokens = text_work([(64, 0)]), text_work([(1, 50)] * 8)
    assert text_s(PROFILE, chunk + tokens) < text_s(PROFILE, chunk) + text_s(PROFILE, tokens)


def test_images_cost_their_patches() -> None:
    assert encode_s(PROFILE, [400, 600]) == pytest.approx(0.1)
    assert encode_s(PROFILE, []) == 0.0
