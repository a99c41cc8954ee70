"""How steps are filled. What becomes of their requests is the scheduler's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.chunking import ChunkCost
from epd.prefill.budget import StepBudget
from epd.prefill.config import PrefillConfig
from epd.prefill.request import PrefillPlan, PrefillRequest
from protocol.messages import RequestId, Sampling

FOR_EVER = 1e9


def _request(order: int, num_tokens: int, done: int = 0) -> PrefillRequest:
    token_ids = np.zeros(num_tokens, np.int32)
    request = PrefillRequest(RequestId(f"r{order}"), 1, token_ids, num_tokens, (), Sampling(), FOR_EVER)
    request.order, request.num_scheduled_tokens = order, done
    return request


def _budget(pair: float, tokens: int = 512, *, beside: int = 512, chunk: int = 10_000, running: int = 8) -> StepBudget:
    return StepBudget(PrefillConfig(16, tokens, beside, chunk, running, 1 << 20, pair_cost=pair))


def _sizes(budget: StepBudget, *requests: PrefillRequest) -> dict[str, int]:
    return {chunk.request.request_id: chunk.num_new for chunk in budget.share(requests, beside_decode=False)}


def test_chunks_of_a_long_prompt_shrink_and_take_equal_time() -> None:
    budget, cost = _budget(1 / 1000), ChunkCost(1 / 1000)
    request = _request(0, 8000)
    sizes, works = [], []
    while request.num_scheduled_tokens < request.num_tokens:
        (chunk,) = budget.share([request], beside_decode=False)
        sizes.append(chunk.num_new)
        works.append(cost.work(chunk.start, chunk.num_new))
        request.num_scheduled_tokens = chunk.end
    assert sizes[:4] == [512, 448, 368, 320]
    assert sizes[-2] == 80
    whole = cost.budget(512)
    assert max(works) <= whole
    assert all(work > whole - cost.work(7900, 16) for work in works[1:-1])  # less than a block short


def test_a_step_deep_in_a_prompt_has_less_room_for_others_too() -> None:
    budget = _budget(1 / 1000)
    deep, short = _request(0, 20_000, done=8992), _request(1, 2000)
    sizes = _sizes(budget, deep, short)
    assert sizes == {"r0": 32, "r1": 400}  # each about half of the time
    assert _sizes(_budget(0.0), deep, short) == {"r0": 256, "r1": 256}


def test_a_prompt_deeper_than_any_budget_still_gets_its_block() -> None:
    assert _sizes(_budget(1.0, 16), _request(0, 100_000, done=90_000)) == {"r0": 16}
    assert _sizes(_budget(1.0, 5), _request(0, 100_000, done=90_000)) == {"r0": 5}


def test_steps_that_come_back_change_the_next_ones() -> None:
    budget = _budget(1e-4)
    request = _request(0, 200_000, done=50_000)
    before = _sizes(budget, request)["r0"]
    for start in range(0, 100_000, 1000):
        step = budget.share([_request(1, 200_000, done=start)], beside_decode=False)
        (chunk,) = step
        budget.took(PrefillPlan(step), 1e-5 * ChunkCost(5e-4).work(chunk.start, chunk.num_new))
    after = _sizes(budget, request)["r0"]
    assert ChunkCost(1e-4).work(50_000, before) == pytest.approx(1.25 * 512, rel=0.1)
    assert ChunkCost(5e-4).work(50_000, after) == pytest.approx(1.25 * 512, rel=0.3)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 4999)), min_size=1, max_size=10),
    st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 4),
)
def test_no_limit_is_passed_and_the_oldest_always_moves(
    prompts: list[tuple[int, int]], pair: float, tokens: int, chunk: int, running: int
) -> None:
    requests = [_request(order, num, done % num) for order, (num, done) in enumerate(prompts)]
    chunks = _budget(pair, tokens, chunk=chunk, running=running).share(requests, beside_decode=False)
    assert requests[0] in [each.request for each in chunks]
    assert len(chunks) <= running
    assert sum(each.num_new for each in chunks) <= tokens
    assert all(0 < each.num_new <= chunk for each in chunks)
    cost = ChunkCost(pair)
    others = sum(cost.work(each.start, each.num_new) for each in chunks if each.request is not requests[0])
    assert others <= cost.budget(tokens) + 1e-3
