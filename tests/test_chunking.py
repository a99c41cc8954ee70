"""Equal steps: against the parabola that they are cut by, and against devices whose cost is known."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.chunking import ChunkCost, StepCosts, num_pairs
from epd.emulated.cost import TextWork, text_s
from tests.emulated.profiles import PROFILE

PAIRS = st.sampled_from([0.0, 1e-6, 4e-5, 1e-3, 0.5])


@given(PAIRS, st.integers(0, 300_000), st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_a_prompt_costs_the_same_however_it_is_cut(pair: float, start: int, cuts: list[int]) -> None:
    cost = ChunkCost(pair)
    ends = [start + sum(cuts[:place]) for place in range(len(cuts) + 1)]
    assert cost.work(start, sum(cuts)) == pytest.approx(sum(cost.work(p, q - p) for p, q in pairwise(ends)))


@given(PAIRS, st.integers(0, 300_000), st.integers(1, 10_000))
def test_a_chunk_after_a_prefix_takes_as_long_as_the_first_one(pair: float, prefix: int, first: int) -> None:
    def whole(length: int) -> float:
        """T(L) without the constant."""
        return pair / 2 * length**2 + length

    count = ChunkCost(pair).num_tokens(prefix, whole(first))
    slack = 1e-5 * (1 + pair * (prefix + first))
    assert whole(prefix + count) - whole(prefix) <= whole(first) + slack
    assert whole(prefix + count + 1) - whole(prefix) > whole(first) - slack
    assert prefix or count == first


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_a_wrong_guess_is_corrected_by_steps(factor: float) -> None:
    """A device with a curve that is flat at first, and a fixed cost in every step."""
    token_s = (PROFILE.text.rows[-1][1] - PROFILE.text.rows[-2][1]) / (PROFILE.text.rows[-1][0] - PROFILE.text.rows[-2][0])
    truth = PROFILE.text.pair_s / token_s
    costs = StepCosts(truth * factor)
    draw = random.Random(3)
    for _ in range(200):
        tokens, start = draw.choice([256, 512, 1024]), draw.randrange(0, int(8 / truth))
        costs.observe(tokens, num_pairs(start, tokens), text_s(PROFILE, TextWork(tokens, int(num_pairs(start, tokens)))))
    assert costs.chunk.pair == pytest.approx(truth, rel=0.2)


def test_short_prompts_leave_the_guess_alone() -> None:
    """Their steps take longer or shorter for other reasons."""
    costs = StepCosts(1e-5)
    draw = random.Random(5)
    for _ in range(500):
        tokens = draw.randrange(20, 300)
        costs.observe(tokens, num_pairs(0, tokens), (0.001 + 1e-5 * tokens) * draw.uniform(1.0, 2.0))
    assert costs.chunk.pair == pytest.approx(1e-5, rel=0.5)


@pytest.mark.parametrize(
    ("seconds_of", "least", "most"),
    [
        pytest.param(lambda tokens, start: 0.01, 1 / 8, 8, id="always the same"),
        pytest.param(lambda tokens, start: 0.01 / tokens, 1 / 8, 8, id="faster with more tokens"),
        pytest.param(lambda tokens, start: 1e-5 * tokens + 1e-3 * start, 8, 8, id="far more attention than can be"),
        pytest.param(lambda tokens, start: 1e-5 * tokens, 1 / 8, 1 / 8, id="none"),
    ],
)
def test_nonsense_moves_the_guess_so_far_and_no_farther(seconds_of: object, least: float, most: float) -> None:
    assert callable(seconds_of)
    costs = StepCosts(1e-4)
    for step in range(500):
        tokens, start = 100 + step % 7 * 100, step * 997 % 100_000
        costs.observe(tokens, num_pairs(start, tokens), seconds_of(tokens, start))
    assert 1e-4 * least <= costs.chunk.pair * 1.001
    assert costs.chunk.pair <= 1e-4 * most * 1.001


def test_what_was_learnt_long_ago_is_forgotten() -> None:
    costs = StepCosts(1e-4)
    for pair_s in (1e-9, 4e-9):
        for step in range(600):
            tokens, start = 500, step * 997 % 100_000
            costs.observe(tokens, num_pairs(start, tokens), 1e-5 * tokens + pair_s * num_pairs(start, tokens))
        assert costs.chunk.pair == pytest.approx(pair_s / 1e-5, rel=0.05)


def test_steps_without_tokens_or_time_teach_nothing() -> None:
    costs = StepCosts(1e-4)
    costs.observe(0, 0.0, 1.0)
    costs.observe(10, 100.0, 0.0)
    assert costs.chunk == ChunkCost(1e-4)


def test_without_a_guess_attention_is_free_for_ever() -> None:
    costs = StepCosts(0.0)
    costs.observe(100, 1e6, 5.0)
    assert costs.chunk.num_tokens(10**6, 100.0) == 100
