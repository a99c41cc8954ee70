"""The prefill scheduler, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epd.cache.block_pool import BlockPool
from epd.errors import BadConfig, BadRequest, EpdError, InternalError, PromptTooLong, StaleHandle
from epd.prefill.config import PrefillConfig
from epd.prefill.request import FinishedBlocks, ItemRows, PrefillPlan, PrefillProgress, PrefillRequest
from epd.prefill.scheduler import PrefillScheduler
from epd.step import Int32Array
from protocol.messages import MMItem, RequestId, Sampling, Token
from tests.support.paged import an_item, ids, ramp

BLOCK = 4
EOS = 0
FOR_EVER = 1e9


class Bench:
    """A scheduler, its pool, and a runner that answers token 7."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        token_budget: int = 16,
        budget_beside_decode: int = 16,
        max_chunk_tokens: int = 16,
        max_running: int = 8,
        max_model_len: int = 64,
        max_steps_in_flight: int = 4,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        eos = frozenset([EOS])
        config = PrefillConfig(
            BLOCK,
            token_budget,
            budget_beside_decode,
            max_chunk_tokens,
            max_running,
            max_model_len,
            eos,
            max_steps_in_flight,
        )
        self.scheduler = PrefillScheduler(config, self.pool)
        self.finished: list[str] = []

    def add(
        self,
        name: str,
        token_ids: Int32Array,
        *items: MMItem,
        epoch: int = 1,
        num_prompt_tokens: int | None = None,
        decode: bool = True,
        ready: bool = False,
        deadline: float = FOR_EVER,
        sampling: Sampling | None = None,
    ) -> PrefillRequest:
        request = PrefillRequest(
            RequestId(name),
            epoch,
            token_ids,
            len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
            items,
            sampling or Sampling(),
            deadline,
        )
        self.scheduler.add(request)
        if decode:
            self.scheduler.decode_ready(request.request_id)
        for index in range(len(items) if ready else 0):
            self.scheduler.embedding_ready(request.request_id, index)
        return request

    def plan(self, *, num_beside: int = 0) -> PrefillPlan:
        plan = self.scheduler.plan(0.0, num_beside=num_beside)
        self.check()
        return plan

    def commit(self, plan: PrefillPlan, token_id: int = 7) -> tuple[PrefillProgress, ...]:
        progress = self.scheduler.commit(plan, [Token(token_id) if chunk.samples else None for chunk in plan.chunks])
        self.finished += [done.request.request_id for done in progress if done.token is not None]
        self.check()
        return progress

    def retract(self, plan: PrefillPlan) -> list[str]:
        """Names of those who are to blame."""
        blamed = self.scheduler.retract(plan)
        self.check()
        return [request.request_id for request in blamed]

    def step(self) -> list[tuple[str, int, int]]:
        """(name, start, end) of every chunk of one step."""
        plan = self.plan()
        self.commit(plan)
        return spans(plan)

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.pool.check_integrity(self.scheduler.tables())


def spans(plan: PrefillPlan) -> list[tuple[str, int, int]]:
    return [(chunk.request.request_id, chunk.start, chunk.end) for chunk in plan.chunks]


# --- chunks -------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_and_its_last_one_samples() -> None:
    bench = Bench()
    bench.add("a", ramp(38))
    plans = []
    while not bench.finished:
        plans.append(bench.plan())
        bench.commit(plans[-1])
    assert [spans(plan) for plan in plans] == [[("a", 0, 16)], [("a", 16, 32)], [("a", 32, 38)]]
    assert [plan.chunks[0].samples for plan in plans] == [False, False, True]
    assert [plan.num_tokens for plan in plans] == [16, 16, 6]
    assert bench.step() == []


def test_a_cut_chunk_ends_on_a_block_boundary() -> None:
    bench = Bench(token_budget=15)
    bench.add("a", ramp(20))
    assert bench.step() == [("a", 0, 12)]
    assert bench.step() == [("a", 12, 20)]


@pytest.mark.parametrize(("token_budget", "max_chunk_tokens"), [(1, 16), (3, 16), (16, 1), (16, 3), (5, 16), (16, 5)])
def test_limits_below_a_block_still_make_progress(token_budget: int, max_chunk_tokens: int) -> None:
    bench = Bench(token_budget=token_budget, max_chunk_tokens=max_chunk_tokens)
    for name in "abc":
        bench.add(name, ramp(9, ord(name)))
    for _ in range(27):
        plan = bench.plan()
        assert 0 < plan.num_tokens <= token_budget
        assert all(chunk.num_new <= max_chunk_tokens for chunk in plan.chunks)
        bench.commit(plan)
        if len(bench.finished) == 3:
            return
    pytest.fail("27 tokens took more than 27 steps")


def test_small_chunks_of_several_requests_share_a_step() -> None:
    bench = Bench(token_budget=16, max_chunk_tokens=2)
    for name in "abc":
        bench.add(name, ramp(9, ord(name)))
    assert bench.step() == [("a", 0, 2), ("b", 0, 2), ("c", 0, 2)]


def test_a_step_holds_several_requests_up_to_both_limits() -> None:
    bench = Bench(token_budget=16, max_running=2)
    for name in "abc":
        bench.add(name, ramp(4, 100 * ord(name)))
    assert bench.step() == [("a", 0, 4), ("b", 0, 4)]
    assert bench.step() == [("c", 0, 4)]


# --- fairness -----------------------------------------------------------------------------------------------------------


def test_a_short_prompt_passes_a_long_one_that_keeps_half() -> None:
    bench = Bench(num_blocks=40, token_budget=16, max_model_len=128)
    bench.add("long", ramp(100))
    assert bench.step() == [("long", 0, 16)]
    bench.add("short", ramp(8, 500))
    assert sorted(bench.step()) == [("long", 16, 24), ("short", 0, 8)]
    assert bench.finished == ["short"]
    assert bench.step() == [("long", 24, 40)]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    bench = Bench(num_blocks=64, token_budget=16, max_model_len=128)
    bench.add("long", ramp(96))
    for number in range(96 // 8):
        bench.add(f"short{number}", ramp(16, 1000 * (number + 1)))
        bench.step()
        for name in bench.finished:
            bench.scheduler.release(RequestId(name))
    assert "long" in bench.finished


def test_equal_prompts_run_one_after_the_other() -> None:
    bench = Bench(token_budget=16)
    bench.add("a", ramp(32))
    bench.add("b", ramp(32, 500))
    assert [bench.step() for _ in range(4)] == [[("a", 0, 16)], [("a", 16, 32)], [("b", 0, 16)], [("b", 16, 32)]]


# --- embeddings ---------------------------------------------------------------------------------------------------------


def test_prefill_runs_up_to_the_first_missing_embedding() -> None:
    bench = Bench(token_budget=64, max_chunk_tokens=64)
    request = bench.add("a", ramp(30), an_item("x", 5, 6), an_item("y", 15, 6))
    assert bench.step() == [("a", 0, 5)]
    assert bench.step() == []
    bench.scheduler.embedding_ready(request.request_id, 1)
    assert bench.step() == []
    bench.scheduler.embedding_ready(request.request_id, 0)
    assert bench.step() == [("a", 5, 30)]


def test_a_chunk_may_end_inside_an_image_and_says_which_rows_it_needs() -> None:
    bench = Bench(token_budget=8)
    bench.add("a", ramp(20), an_item("x", 2, 3), an_item("y", 5, 10), ready=True)
    rows = []
    while not bench.finished:
        plan = bench.plan()
        rows.append(plan.chunks[0].item_rows())
        bench.commit(plan)
    assert rows == [
        (ItemRows(0, 0, 3, 2), ItemRows(1, 0, 3, 5)),
        (ItemRows(1, 3, 7, 0),),
        (),
    ]


def test_what_waits_for_an_embedding_holds_nobody_up() -> None:
    bench = Bench()
    bench.add("first token is an image", ramp(20), an_item("x", 0, 4))
    bench.add("stalled", ramp(20, 300), an_item("y", 6, 4))
    bench.add("text", ramp(8, 600))
    assert sorted(bench.step()) == [("stalled", 0, 6), ("text", 0, 8)]
    assert bench.finished == ["text"]
    assert bench.scheduler.num_waiting == 1  # it has nothing to compute, so it holds no blocks


def test_needed_items_shrink_and_never_grow() -> None:
    bench = Bench(token_budget=8)
    request = bench.add("a", ramp(24), an_item("x", 2, 3), an_item("y", 6, 10), ready=True)
    needed = [bench.scheduler.needed_items(request.request_id)]
    while not bench.finished:
        bench.step()
        needed.append(bench.scheduler.needed_items(request.request_id))
    assert needed == [(0, 1), (1,), (), ()]
    assert bench.scheduler.needed_items(RequestId("unknown")) == ()


# --- the prefix cache ---------------------------------------------------------------------------------------------------


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    bench = Bench()
    bench.add("a", ramp(16))
    bench.step()
    bench.scheduler.release(RequestId("a"))
    same, longer = bench.add("same", ramp(16)), bench.add("longer", ramp(19))
    plan = bench.plan()
    assert spans(plan) == [("same", 12, 16), ("longer", 16, 19)]
    assert plan.reused == (
        FinishedBlocks(same, 0, tuple(same.block_table[:3])),
        FinishedBlocks(longer, 0, tuple(longer.block_table[:4])),
    )
    assert (same.num_cached_tokens, longer.num_cached_tokens) == (12, 16)
    assert same.block_table[:3] == longer.block_table[:3]
    bench.commit(plan)
    assert bench.finished == ["a", "same", "longer"]


def test_another_image_behind_the_same_placeholders_is_not_taken_from_the_cache() -> None:
    bench = Bench()
    bench.add("a", ramp(16), an_item("x", 4, 4), ready=True)
    bench.step()
    other = bench.add("other", ramp(16), an_item("z", 4, 4), ready=True)
    assert bench.step() == [("other", 4, 16)]
    assert other.num_cached_tokens == 4


def test_an_image_in_the_cached_prefix_needs_no_embedding() -> None:
    bench = Bench()
    items = (an_item("x", 2, 4), an_item("y", 9, 4))
    bench.add("a", ramp(20), *items, ready=True)
    bench.step()
    bench.step()
    again = bench.add("again", ramp(10), items[0])
    assert bench.scheduler.needed_items(again.request_id) == (0,)  # the cache may yet lose it
    assert bench.step() == [("again", 8, 10)]
    assert bench.scheduler.needed_items(again.request_id) == ()


def test_a_prefix_that_ends_inside_an_image_still_needs_its_embedding() -> None:
    bench = Bench(token_budget=4)
    gone = bench.add("gone", ramp(12), an_item("x", 2, 8), ready=True)
    assert bench.step() == [("gone", 0, 4)]
    bench.scheduler.abort(gone.request_id)
    again = bench.add("again", ramp(12), an_item("x", 2, 8))
    assert bench.step() == []
    bench.scheduler.embedding_ready(again.request_id, 0)
    assert bench.step() == [("again", 4, 8)]


def test_who_shares_a_prefix_with_a_running_request_waits_for_it() -> None:
    bench = Bench(token_budget=8)
    bench.add("a", ramp(20))
    bench.add("b", ramp(20))
    bench.add("c", ramp(9, 500))
    assert [bench.step() for _ in range(2)] == [[("a", 0, 4), ("c", 0, 4)], [("a", 4, 8), ("c", 4, 8)]]
    assert [bench.step() for _ in range(2)] == [[("a", 8, 15), ("c", 8, 9)], [("a", 15, 20)]]
    assert bench.step() == [("b", 16, 20)]
    assert bench.finished == ["c", "a", "b"]


def test_nobody_waits_for_a_prefix_of_a_request_that_is_stalled_or_gone() -> None:
    bench = Bench()
    stalled = bench.add("stalled", ramp(20), an_item("x", 4, 4))
    assert bench.step() == [("stalled", 0, 4)]
    bench.add("a", ramp(20), an_item("x", 4, 4), ready=True)
    assert bench.step() == [("a", 4, 20)]
    gone = bench.add("gone", ramp(40, 500))
    bench.add("b", ramp(20, 500))
    assert bench.step() == [("gone", 0, 16)]
    bench.scheduler.abort(gone.request_id)
    assert bench.step() == [("b", 16, 20)]
    bench.scheduler.abort(stalled.request_id)


# --- blocks -------------------------------------------------------------------------------------------------------------


def test_a_request_has_all_its_blocks_from_the_start_and_keeps_them_until_released() -> None:
    bench = Bench(num_blocks=16, token_budget=4)
    request = bench.add("a", ramp(18))
    bench.step()
    assert len(request.block_table) == 5
    while not bench.finished:
        bench.step()
    assert bench.pool.num_free == 11
    assert bench.scheduler.get(request.request_id) is request
    bench.scheduler.release(request.request_id)
    assert bench.pool.is_idle()
    assert bench.scheduler.is_idle()
    bench.scheduler.release(request.request_id)


def test_finished_blocks_are_told_once_each_with_the_partly_filled_one_last() -> None:
    bench = Bench(token_budget=10)
    request = bench.add("a", ramp(22), an_item("x", 9, 4))
    told: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(5):
        for progress in bench.commit(bench.plan()):
            if progress.blocks is not None:
                told.append((progress.blocks.first_block, progress.blocks.block_ids))
        bench.scheduler.embedding_ready(request.request_id, 0)
    table = request.block_table
    assert told == [(0, tuple(table[:2])), (2, tuple(table[2:4])), (4, tuple(table[4:]))]
    assert len(table) == 6


def test_blocks_go_out_in_order_of_arrival_and_a_small_request_does_not_pass_a_large_one() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", ramp(40))
    bench.step()
    bench.add("large", ramp(40, 500))
    bench.add("small", ramp(4, 900))
    while "a" not in bench.finished:
        assert {name for name, _, _ in bench.step()} == {"a"}
    bench.scheduler.release(RequestId("a"))
    assert {name for name, _, _ in bench.step()} == {"large", "small"}


def test_what_depends_on_other_workers_leaves_room_for_one_request_of_any_length() -> None:
    bench = Bench(num_blocks=20, max_model_len=40)  # ten blocks for the stalled
    bench.add("no image yet", ramp(20), an_item("x", 8, 4))
    bench.add("no decode yet", ramp(20, 300), decode=False)
    third = bench.add("one too many", ramp(4, 600), decode=False)
    bench.add("longest", ramp(39, 900))
    seen = {name for _ in range(8) for name, _, _ in bench.step()}
    assert seen == {"no image yet", "no decode yet", "longest"}
    assert set(bench.finished) == {"no decode yet", "longest"}
    bench.scheduler.decode_ready(third.request_id)
    assert bench.step() == []  # the longest still holds the rest
    bench.scheduler.release(RequestId("longest"))
    assert bench.step() == [("one too many", 0, 4)]


def test_a_finished_request_is_stalled_until_decode_takes_it() -> None:
    bench = Bench(num_blocks=20, max_model_len=60)  # five blocks for the stalled
    first = bench.add("first", ramp(16), decode=False)
    bench.step()
    bench.add("second", ramp(16, 300), decode=False)
    assert bench.step() == []
    bench.scheduler.decode_ready(first.request_id)
    assert bench.step() == [("second", 0, 16)]


def test_with_room_for_one_token_nobody_will_decode() -> None:
    bench = Bench(num_blocks=16, max_model_len=64)  # none for the stalled
    bench.add("a", ramp(8), decode=False, sampling=Sampling(max_tokens=1))
    bench.add("b", ramp(8, 300), decode=False, sampling=Sampling(max_tokens=2))
    bench.add("c", ramp(8, 600), num_prompt_tokens=6, decode=False, sampling=Sampling(max_tokens=3))
    assert bench.step() == [("a", 0, 8), ("c", 0, 8)]


def test_a_block_is_left_for_each_request_that_decodes_on_the_same_pool() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", ramp(16))
    bench.add("b", ramp(16, 300))
    assert spans(bench.plan(num_beside=13)) == []
    assert spans(bench.plan(num_beside=12)) == [("a", 0, 16)]


def test_steps_are_short_while_somebody_decodes_on_the_same_worker() -> None:
    bench = Bench(num_blocks=64, token_budget=16, budget_beside_decode=8)
    bench.add("a", ramp(28))
    assert spans(bench.plan()) == [("a", 0, 16)]
    assert spans(bench.plan(num_beside=1)) == [("a", 16, 24)]
    assert spans(bench.plan()) == [("a", 24, 28)]


def test_a_budget_beside_decode_above_the_budget_changes_nothing() -> None:
    bench = Bench(num_blocks=64, token_budget=8, budget_beside_decode=100)
    bench.add("a", ramp(12))
    assert spans(bench.plan(num_beside=1)) == [("a", 0, 8)]


def test_a_table_outlives_its_prefill_by_the_references_of_others() -> None:
    bench = Bench(num_blocks=16)
    request = bench.add("a", ramp(10))
    with pytest.raises(InternalError, match="not finished"):
        bench.scheduler.release(request.request_id)
    bench.step()
    table = list(request.block_table)
    bench.pool.take(table)
    bench.scheduler.release(request.request_id)
    assert len(table) == 3
    assert bench.scheduler.is_idle()
    bench.pool.check_integrity([table])


# --- first tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_id", "sampling", "num_generated", "reason"),
    [
        (7, Sampling(max_tokens=2), 0, ""),
        (7, Sampling(max_tokens=1), 0, "length"),
        (7, Sampling(max_tokens=4), 3, "length"),
        (7, Sampling(max_tokens=5), 3, ""),
        (EOS, Sampling(max_tokens=9), 0, "stop"),
        (EOS, Sampling(max_tokens=1), 0, "stop"),
        (EOS, Sampling(max_tokens=9, ignore_eos=True), 0, ""),
        (7, Sampling(max_tokens=9, stop_token_ids=(7,)), 0, "stop"),
        (7, Sampling(max_tokens=9, stop_token_ids=(7,), ignore_eos=True), 0, "stop"),
    ],
)
def test_the_first_token_may_be_the_last(token_id: int, sampling: Sampling, num_generated: int, reason: str) -> None:
    bench = Bench()
    bench.add("a", ramp(8), num_prompt_tokens=8 - num_generated, sampling=sampling)
    (progress,) = bench.commit(bench.plan(), token_id)
    assert progress.token == Token(token_id, finish_reason=reason)


def test_the_context_may_be_full_with_the_first_token() -> None:
    bench = Bench(max_model_len=9)
    bench.add("a", ramp(8), decode=False)
    (progress,) = bench.commit(bench.plan())
    assert progress.token == Token(7, finish_reason="length")


# --- steps in flight ----------------------------------------------------------------------------------------------------


def test_several_steps_may_be_planned_ahead() -> None:
    bench = Bench()
    bench.add("a", ramp(40))
    plans = [bench.plan(), bench.plan(), bench.plan(), bench.plan()]
    assert [spans(plan) for plan in plans] == [[("a", 0, 16)], [("a", 16, 32)], [("a", 32, 40)], []]
    with pytest.raises(InternalError, match="out of order"):
        bench.scheduler.commit(plans[1], [None])


def test_committing_ahead_in_order_finishes() -> None:
    bench = Bench()
    bench.add("a", ramp(40))
    for plan in [bench.plan(), bench.plan(), bench.plan()]:
        bench.commit(plan)
    assert bench.finished == ["a"]


def test_blocks_under_a_running_step_are_not_given_away() -> None:
    bench = Bench(num_blocks=16)
    request = bench.add("a", ramp(40))
    first, second = bench.plan(), bench.plan()
    assert bench.scheduler.abort(request.request_id)
    bench.check()
    assert bench.pool.num_free == 6
    assert not bench.scheduler.is_idle()
    assert bench.commit(first) == ()
    assert bench.pool.num_free == 6
    assert bench.commit(second) == ()
    assert bench.pool.num_free == 16
    assert bench.pool.num_cached == 0
    assert bench.scheduler.is_idle()


def test_a_newer_epoch_may_come_while_the_older_is_in_flight() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", ramp(20))
    old = bench.plan()
    newer = bench.add("a", ramp(20), epoch=2)
    plan = bench.plan()
    assert plan.chunks[0].request is newer
    bench.commit(old)
    assert newer.num_computed_tokens == 0
    bench.commit(plan)
    assert newer.num_computed_tokens == 16


def test_blocks_are_told_when_the_step_that_writes_them_has_come_back() -> None:
    bench = Bench()
    request = bench.add("a", ramp(40))
    first, second = bench.plan(), bench.plan()
    assert request.num_told_blocks == 0
    (progress,) = bench.commit(first)
    assert progress.blocks == FinishedBlocks(request, 0, tuple(request.block_table[:4]))
    (progress,) = bench.commit(second)
    assert progress.blocks == FinishedBlocks(request, 4, tuple(request.block_table[4:8]))


def test_an_embedding_is_needed_until_the_step_that_reads_it_has_come_back() -> None:
    bench = Bench()
    request = bench.add("a", ramp(40), an_item("x", 2, 8), ready=True)
    plans = [bench.plan(), bench.plan()]
    assert bench.scheduler.needed_items(request.request_id) == (0,)
    bench.commit(plans[0])
    assert bench.scheduler.needed_items(request.request_id) == ()


def test_there_is_a_limit_to_the_steps_in_flight() -> None:
    bench = Bench(max_steps_in_flight=2)
    bench.add("a", ramp(40))
    plans = []
    while bench.scheduler.can_plan:
        plans.append(bench.plan())
    assert len(plans) == 2
    with pytest.raises(InternalError, match="2 prefill steps are not committed yet"):
        bench.plan()


def test_of_a_failed_step_only_the_culprit_ends() -> None:
    bench = Bench(token_budget=64, max_chunk_tokens=8)
    for name in "abc":
        bench.add(name, ramp(16, 100 * ord(name)))
    assert bench.retract(bench.plan()) == []
    tried = [plan := bench.plan()]
    assert bench.retract(plan) == []
    tried.append(plan := bench.plan())
    bench.commit(plan)
    tried.append(plan := bench.plan())
    assert bench.retract(plan) == ["b"]
    tried.append(plan := bench.plan())
    bench.commit(plan)
    assert [spans(plan) for plan in tried] == [[("a", 0, 8), ("b", 0, 8)], [("a", 0, 8)], [("b", 0, 8)], [("c", 0, 8)]]
    assert bench.step() == [("a", 8, 16), ("c", 8, 16)]


def test_a_step_that_follows_a_failed_one_counts_for_nothing() -> None:
    bench = Bench()
    request, other = bench.add("a", ramp(40)), bench.add("b", ramp(4, 300))
    first = bench.plan()
    assert {name for name, _, _ in spans(first)} == {"a", "b"}
    second = bench.plan()
    assert spans(second) == [("a", 12, 28)]
    assert bench.retract(first) == []
    assert bench.scheduler.needed_items(request.request_id) == ()
    assert spans(bench.plan()) == []  # while the second is in flight
    assert bench.commit(second) == ()
    assert request.num_told_blocks == 0
    assert bench.pool.num_cached == 0
    plans = [bench.plan()]
    bench.commit(plans[0])
    plans.append(bench.plan())
    bench.commit(plans[1])
    assert sorted(span for plan in plans for span in spans(plan)) == [("a", 0, 12), ("b", 0, 4)]
    assert other.num_computed_tokens == 4
    assert bench.step() == [("a", 12, 28)]


def test_nobody_is_blamed_for_a_step_that_was_shared_with_one_who_has_left() -> None:
    bench = Bench()
    first = bench.add("a", ramp(8))
    bench.add("b", ramp(8, 300))
    plan = bench.plan()
    bench.scheduler.abort(first.request_id)
    assert bench.retract(plan) == []
    assert bench.step() == [("b", 0, 8)]


def test_a_request_that_fails_alone_ends_with_the_last_of_its_steps() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", ramp(32))
    first, second = bench.plan(), bench.plan()
    assert bench.retract(first) == ["a"]
    assert bench.pool.num_free == 8
    assert bench.retract(second) == []
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()


# --- leaving and refusing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_gives_everything_back_in_any_state(num_steps: int) -> None:
    bench = Bench()
    request = bench.add("a", ramp(40))
    for _ in range(num_steps):
        bench.step()
    assert not bench.scheduler.abort(request.request_id, epoch=0)
    assert bench.scheduler.abort(request.request_id, epoch=1)
    assert not bench.scheduler.abort(request.request_id)
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()
    bench.check()


def test_overdue_requests_are_named_in_every_state() -> None:
    bench = Bench(max_running=1)
    bench.add("done", ramp(8), deadline=5.0)
    bench.step()
    bench.add("running", ramp(30, 300), deadline=5.0)
    bench.step()
    bench.add("waiting", ramp(30, 600), deadline=5.0)
    bench.add("later", ramp(30, 900), deadline=6.0)
    assert bench.scheduler.expired(4.9) == ()
    assert bench.scheduler.expired(5.0) == ("done", "running", "waiting")


def test_counts_tell_what_is_outstanding() -> None:
    bench = Bench(max_running=1)
    bench.add("a", ramp(20))
    bench.add("b", ramp(30, 300))
    bench.step()
    scheduler = bench.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.outstanding_tokens) == (1, 1, 34)
    assert scheduler.get(RequestId("a")) is not None
    assert scheduler.get(RequestId("c")) is None


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (lambda bench: bench.add("b", ramp(64)), PromptTooLong, "64 tokens leave no room for output; the model's context is 64"),
        (lambda bench: bench.add("b", ids()), BadRequest, "0 prompt tokens of 0"),
        (lambda bench: bench.add("b", ramp(4), num_prompt_tokens=0), BadRequest, "0 prompt tokens of 4"),
        (lambda bench: bench.add("b", ramp(4), num_prompt_tokens=5), BadRequest, "5 prompt tokens of 4"),
        (lambda bench: bench.add("b", ramp(4), an_item("x", 2, 3)), BadRequest, r"\[2, 5\) does not fit after token 0 of 4"),
        (lambda bench: bench.add("b", ramp(4), an_item("x", 2, 0)), BadRequest, "does not fit"),
        (lambda bench: bench.add("b", ramp(9), an_item("x", 2, 3), an_item("y", 4, 3)), BadRequest, "does not fit after token 5"),
        (lambda bench: bench.add("a", ramp(4), epoch=1), StaleHandle, "is known with epoch 1"),
        (lambda bench: bench.add("a", ramp(4), epoch=0), StaleHandle, "is known with epoch 1"),
        (lambda bench: bench.scheduler.embedding_ready(RequestId("a"), 1), BadRequest, "has no image 1"),
        (lambda bench: bench.scheduler.embedding_ready(RequestId("a"), -1), BadRequest, "has no image -1"),
        (lambda bench: bench.scheduler.release(RequestId("a")), InternalError, "not finished"),
    ],
)
def test_what_cannot_be_is_refused(add: Callable[[Bench], object], error: type[EpdError], message: str) -> None:
    bench = Bench()
    bench.add("a", ramp(12), an_item("x", 4, 4))
    with pytest.raises(error, match=message):
        add(bench)
    bench.check()
    assert bench.step() == [("a", 0, 4)]


def test_unknown_requests_are_no_error_where_news_may_be_late() -> None:
    bench = Bench()
    unknown = RequestId("unknown")
    bench.scheduler.embedding_ready(unknown, 0)
    bench.scheduler.decode_ready(unknown)
    bench.scheduler.release(unknown)
    assert not bench.scheduler.abort(unknown)


def test_outputs_must_fit_the_plan() -> None:
    bench = Bench()
    bench.add("a", ramp(4))
    plan = bench.plan()
    with pytest.raises(InternalError, match="0 outputs for 1 chunks"):
        bench.scheduler.commit(plan, [])
    with pytest.raises(InternalError, match="a token is due"):
        bench.scheduler.commit(plan, [None])


@pytest.mark.parametrize("config", [{"token_budget": 0}, {"max_chunk_tokens": 0}, {"max_running": 0}, {"num_blocks": 15}])
def test_limits_that_cannot_work_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(BadConfig):
        Bench(**config)


def _forget_a_block(request: PrefillRequest) -> None:
    request.block_table.pop()


def _compute_too_much(request: PrefillRequest) -> None:
    request.num_computed_tokens = request.num_scheduled_tokens + 1


@pytest.mark.parametrize("damage", [_forget_a_block, _compute_too_much])
def test_damage_is_found(damage: Callable[[PrefillRequest], None]) -> None:
    bench = Bench()
    request = bench.add("a", ramp(30))
    bench.step()
    damage(request)
    with pytest.raises(InternalError, match="prefill scheduler: a: "):
        bench.scheduler.check_integrity()
