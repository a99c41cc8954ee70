"""The decode scheduler, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epd.cache.block_pool import BlockPool
from epd.cache.prefix import block_hashes
from epd.decode.request import DecodeOutput, DecodePlan, DecodeRequest, Reservation
from epd.decode.scheduler import DecodeConfig, DecodeScheduler
from epd.errors import BadConfig, BadRequest, EpdError, InternalError, PromptTooLong, StaleHandle
from epd.step import PENDING, Int32Array
from protocol.messages import MMItem, RequestId, Sampling, Token
from tests.support.paged import an_item, ids, ramp

BLOCK = 4
EOS = 0
FOR_EVER = 1e9


class Bench:
    """A scheduler and its pool. Every handoff brings token 7, every step draws 8."""

    def __init__(self, *, num_blocks: int = 64, max_running: int = 8, max_model_len: int = 32, in_flight: int = 1) -> None:
        self.pool = BlockPool(num_blocks)
        config = DecodeConfig(BLOCK, max_running, max_model_len, frozenset([EOS]), in_flight)
        self.scheduler = DecodeScheduler(config, self.pool)

    def request(
        self,
        name: str,
        token_ids: Int32Array,
        *items: MMItem,
        epoch: int = 1,
        num_prompt_tokens: int | None = None,
        deadline: float = FOR_EVER,
        sampling: Sampling | None = None,
    ) -> DecodeRequest:
        num_prompt = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
        return DecodeRequest(RequestId(name), epoch, token_ids, num_prompt, items, sampling or Sampling(max_tokens=99), deadline)

    def add(self, name: str, token_ids: Int32Array, *items: MMItem, epoch: int = 1, deadline: float = FOR_EVER) -> DecodeRequest:
        request = self.request(name, token_ids, *items, epoch=epoch, deadline=deadline)
        self.scheduler.add(request)
        return request

    def reserve(self) -> list[tuple[str, int, int]]:
        """(name, first block to pull, number of blocks to pull)."""
        reserved = self.scheduler.reserve()
        self.check()
        return [(made.request.request_id, made.first_block, len(made.block_ids)) for made in reserved]

    def run(
        self, name: str, token_ids: Int32Array, *items: MMItem, epoch: int = 1, sampling: Sampling | None = None
    ) -> DecodeRequest:
        """A request right after its handoff."""
        request = self.request(name, token_ids, *items, epoch=epoch, sampling=sampling)
        self.scheduler.add(request)
        self.scheduler.reserve()
        self.scheduler.handoff(request.request_id, len(token_ids), Token(7))
        self.check()
        return request

    def plan(self) -> DecodePlan:
        plan = self.scheduler.plan()
        self.check()
        return plan

    def commit(self, plan: DecodePlan, token_id: int = 8) -> tuple[DecodeOutput, ...]:
        outputs = self.scheduler.commit(plan, [Token(token_id)] * len(plan.steps))
        self.check()
        return outputs

    def retract(self, plan: DecodePlan) -> list[str]:
        """Names of those who are to blame."""
        blamed = self.scheduler.retract(plan)
        self.check()
        return [request.request_id for request in blamed]

    def step(self) -> list[tuple[str, int, int]]:
        """(name, token fed, its position) of every sequence of one step."""
        plan = self.plan()
        self.commit(plan)
        return fed(plan)

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.pool.check_integrity(self.scheduler.tables())


def fed(plan: DecodePlan) -> list[tuple[str, int, int]]:
    return [(step.request.request_id, step.token_id, step.position) for step in plan.steps]


# --- reserving ----------------------------------------------------------------------------------------------------------


def test_a_reservation_holds_the_prompt_and_one_token_and_names_what_to_pull() -> None:
    bench = Bench()
    a, b = bench.add("a", ramp(7)), bench.add("b", ramp(8, 300))
    reserved = bench.scheduler.reserve()
    assert reserved == (Reservation(a, 0, tuple(a.block_table)), Reservation(b, 0, tuple(b.block_table[:2])))
    assert (len(a.block_table), len(b.block_table)) == (2, 3)
    assert bench.scheduler.num_receiving == 2
    assert bench.scheduler.reserve() == ()


def test_reservations_are_made_in_order_of_arrival() -> None:
    bench = Bench(num_blocks=8)
    bench.add("a", ramp(20))
    bench.add("large", ramp(20, 300))
    bench.add("small", ramp(2, 600))
    assert bench.reserve() == [("a", 0, 5)]
    assert bench.reserve() == []
    bench.scheduler.abort(RequestId("a"))
    assert bench.reserve() == [("large", 0, 5), ("small", 0, 1)]


def test_a_free_block_is_left_to_each_request_that_has_some() -> None:
    bench = Bench(num_blocks=8)
    bench.run("a", ramp(7))
    bench.add("b", ramp(7, 300))
    bench.add("c", ramp(10, 600))
    bench.add("d", ramp(2, 900))
    assert bench.reserve() == [("b", 0, 2)]  # c needs three blocks, and of the four free ones two are kept
    bench.scheduler.abort(RequestId("c"))
    assert bench.reserve() == [("d", 0, 1)]


def test_only_blocks_that_are_not_cached_here_are_pulled() -> None:
    bench = Bench()
    first = bench.run("a", ramp(10))
    assert first.num_cached_blocks == 0
    for _ in range(3):
        bench.step()
    said = ids(*first.buffer[: first.num_tokens])
    bench.scheduler.abort(RequestId("a"))
    next_turn = bench.add("next turn", ids(*said, 1, 2, 3, 4, 5))
    assert len(said) == 14
    assert bench.reserve() == [("next turn", 3, 2)]  # twelve tokens are cached, in three blocks
    assert next_turn.num_cached_blocks == 3
    assert (bench.pool.cache_hits, bench.pool.cache_queries) == (3, 2 + 4)


def test_a_prompt_that_is_cached_whole_needs_nothing() -> None:
    bench = Bench()
    bench.run("a", ramp(8))
    bench.add("again", ramp(8))
    assert bench.reserve() == [("again", 2, 0)]
    assert bench.scheduler.handoff(RequestId("again"), 8, Token(7))
    assert ("again", 7, 8) in bench.step()


def test_another_image_is_not_taken_from_the_cache() -> None:
    bench = Bench()
    bench.run("a", ramp(12), an_item("x", 4, 4))
    bench.add("same", ramp(12), an_item("x", 4, 4))
    bench.add("other", ramp(12), an_item("y", 4, 4))
    assert bench.reserve() == [("same", 3, 0), ("other", 1, 2)]


# --- steps --------------------------------------------------------------------------------------------------------------


def test_each_step_feeds_the_last_token_and_takes_a_block_when_it_needs_one() -> None:
    bench = Bench()
    request = bench.run("a", ramp(7))
    assert [bench.step() for _ in range(3)] == [[("a", 7, 7)], [("a", 8, 8)], [("a", 8, 9)]]
    assert len(request.block_table) == 3
    assert request.output_token_ids.tolist() == [7, 8, 8, 8]
    assert request.prompt_token_ids.tolist() == ramp(7).tolist()


def test_outputs_are_numbered_from_the_end_of_the_prompt() -> None:
    bench = Bench()
    request = bench.request("a", ramp(10), num_prompt_tokens=6)
    bench.scheduler.add(request)
    bench.scheduler.reserve()
    bench.scheduler.handoff(request.request_id, 10, Token(7))
    (output,) = bench.commit(bench.plan())
    assert output == DecodeOutput(request, 5, Token(8))


@pytest.mark.parametrize(
    ("token_id", "sampling", "num_steps", "reason"),
    [
        (8, Sampling(max_tokens=4), 3, "length"),
        (8, Sampling(max_tokens=2), 1, "length"),
        (8, Sampling(max_tokens=99), 32 - 7 - 1, "length"),
        (EOS, Sampling(max_tokens=99), 1, "stop"),
        (EOS, Sampling(max_tokens=4, ignore_eos=True), 3, "length"),
        (8, Sampling(max_tokens=4, stop_token_ids=(8,), ignore_eos=True), 1, "stop"),
        (8, Sampling(max_tokens=2, stop_token_ids=(8,)), 1, "stop"),
    ],
)
def test_an_output_ends_as_it_should(token_id: int, sampling: Sampling, num_steps: int, reason: str) -> None:
    bench = Bench()
    request = bench.request("a", ramp(7), sampling=sampling)
    bench.scheduler.add(request)
    bench.scheduler.reserve()
    assert bench.scheduler.handoff(request.request_id, 7, Token(7))
    reasons = [bench.commit(bench.plan(), token_id)[0].token.finish_reason for _ in range(num_steps)]
    assert reasons == [""] * (num_steps - 1) + [reason]
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()


@pytest.mark.parametrize(
    ("token", "sampling"),
    [
        (Token(EOS), Sampling(max_tokens=9)),
        (Token(7), Sampling(max_tokens=1)),
        (Token(7), Sampling(max_tokens=9, stop_token_ids=(7,))),
    ],
)
def test_the_first_token_may_be_the_last(token: Token, sampling: Sampling) -> None:
    bench = Bench()
    request = bench.request("a", ramp(7), sampling=sampling)
    bench.scheduler.add(request)
    bench.scheduler.reserve()
    assert not bench.scheduler.handoff(request.request_id, 7, token)
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()
    bench.check()


def test_a_step_takes_the_oldest_requests_and_later_ones_join_when_there_is_room() -> None:
    bench = Bench(max_running=2)
    for name in "abc":
        bench.run(name, ramp(3, ord(name)))
    assert [name for name, _, _ in bench.step()] == ["a", "b"]
    bench.scheduler.abort(RequestId("a"))
    assert [name for name, _, _ in bench.step()] == ["b", "c"]


def test_full_blocks_are_published_with_the_name_that_prefill_would_give_them() -> None:
    bench = Bench()
    item = an_item("x", 2, 4)
    request = bench.run("a", ramp(7), item)
    for _ in range(9):
        bench.step()
    said = ids(*request.buffer[: request.num_computed_tokens])
    assert len(said) == 16
    names = block_hashes(said, (item,), BLOCK)
    assert request.hashes == names
    assert bench.pool.lookup(names) == request.block_table[:4]


# --- preemption ---------------------------------------------------------------------------------------------------------


def test_the_request_that_arrived_last_gives_way() -> None:
    bench = Bench(num_blocks=12)
    for name in "abcd":
        bench.run(name, ramp(4, ord(name)))  # two blocks each, and a third one after four steps
    for _ in range(8):
        assert [name for name, _, _ in bench.step()] == ["a", "b", "c", "d"]
    plan = bench.plan()
    assert fed(plan) == [("a", 8, 12), ("b", 8, 12), ("c", 8, 12)]
    assert [(request.request_id, request.num_output_tokens) for request in plan.preempted] == [("d", 9)]
    assert bench.scheduler.num_preemptions == 1
    assert not bench.scheduler.abort(RequestId("d"))
    bench.commit(plan)
    for _ in range(3):
        bench.step()
    plan = bench.plan()
    assert fed(plan) == [("a", 8, 16), ("b", 8, 16)]
    assert [request.request_id for request in plan.preempted] == ["c"]


def test_who_came_last_and_needs_a_block_gives_way_itself() -> None:
    bench = Bench(num_blocks=5, max_model_len=20)
    bench.run("a", ramp(6))
    bench.run("b", ramp(5, 300))
    for _ in range(3):
        assert [name for name, _, _ in bench.step()] == ["a", "b"]  # in the third one a takes the last block
    plan = bench.plan()
    assert fed(plan) == [("a", 8, 9)]
    assert [request.request_id for request in plan.preempted] == ["b"]


def test_the_only_running_request_waits_for_what_is_being_received() -> None:
    bench = Bench(num_blocks=8)
    bench.add("b", ramp(15, 300))
    bench.run("a", ramp(11))
    for position in range(11, 16):
        assert [place for _, _, place in bench.step()] == [position]
    assert bench.step() == []  # the pool is full
    assert bench.scheduler.num_preemptions == 0
    bench.scheduler.handoff(RequestId("b"), 15, Token(7))
    plan = bench.plan()
    assert fed(plan) == [("b", 7, 15)]
    assert [request.request_id for request in plan.preempted] == ["a"]  # b is older


def test_alone_a_request_of_any_length_fits() -> None:
    bench = Bench(num_blocks=8, max_model_len=32)
    bench.run("a", ramp(30))
    assert bench.step() == [("a", 7, 30)]
    assert bench.scheduler.is_idle()


# --- one step ahead -----------------------------------------------------------------------------------------------------

PENALTY = Sampling(max_tokens=99, repetition_penalty=1.1)


def test_a_step_is_planned_while_another_is_in_flight() -> None:
    bench = Bench(in_flight=2)
    request = bench.run("a", ramp(7))
    first, second = bench.plan(), bench.plan()
    assert (fed(first), fed(second)) == ([("a", 7, 7)], [("a", PENDING, 8)])
    assert len(request.block_table) == 3  # the second writes to a block that the first does not need
    assert not bench.scheduler.can_plan
    assert bench.commit(first, 21) == (DecodeOutput(request, 1, Token(21)),)
    third = bench.plan()
    assert fed(third) == [("a", PENDING, 9)]
    assert [bench.commit(plan, token)[0].index for plan, token in ((second, 22), (third, 23))] == [2, 3]
    assert request.output_token_ids.tolist() == [7, 21, 22, 23]


def test_a_newcomer_joins_the_step_that_is_planned_ahead() -> None:
    bench = Bench(in_flight=2)
    bench.run("a", ramp(7))
    first = bench.plan()
    bench.run("b", ramp(7, 300))
    assert fed(bench.plan()) == [("a", PENDING, 8), ("b", 7, 7)]
    bench.commit(first)


@pytest.mark.parametrize(
    ("sampling", "max_model_len"), [(Sampling(max_tokens=3, ignore_eos=True), 32), (Sampling(max_tokens=99, ignore_eos=True), 10)]
)
def test_what_is_certain_to_end_is_not_planned_again(sampling: Sampling, max_model_len: int) -> None:
    bench = Bench(in_flight=2, max_model_len=max_model_len)
    bench.run("a", ramp(7), sampling=sampling)
    first, second = bench.plan(), bench.plan()
    assert (fed(first), fed(second)) == ([("a", 7, 7)], [("a", PENDING, 8)])
    bench.commit(first)
    assert fed(bench.plan()) == []
    (output,) = bench.commit(second)
    assert output.token.finish_reason == "length"
    assert bench.pool.is_idle()


def test_a_surplus_token_is_dropped_and_its_block_stays_held_until_it_is_written() -> None:
    bench = Bench(num_blocks=8, in_flight=2)
    request = bench.run("a", ramp(7))
    first, second = bench.plan(), bench.plan()
    table = list(request.block_table)
    (output,) = bench.commit(first, EOS)
    assert output.token.finish_reason == "stop"
    assert bench.scheduler.num_running == 0
    assert not bench.scheduler.is_idle()
    taken = bench.pool.allocate(bench.pool.num_free)
    assert taken is not None
    assert not set(taken) & set(table)
    bench.pool.free(taken)
    assert bench.commit(second) == ()
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()


def test_blocks_of_an_aborted_request_stay_held_until_its_last_step_has_come_back() -> None:
    bench = Bench(num_blocks=8, in_flight=2)
    bench.run("a", ramp(7))
    first, second = bench.plan(), bench.plan()
    bench.scheduler.abort(RequestId("a"))
    bench.check()
    assert bench.commit(first) == ()
    assert bench.pool.num_free == 5
    assert bench.commit(second) == ()
    assert bench.pool.is_idle()


def test_steps_come_back_in_order() -> None:
    bench = Bench(in_flight=2)
    bench.run("a", ramp(7))
    _, second = bench.plan(), bench.plan()
    with pytest.raises(InternalError, match="not the oldest"):
        bench.commit(second)


def test_who_needs_its_history_sits_out_while_its_last_token_is_unknown() -> None:
    bench = Bench(in_flight=2, max_running=16)
    for number in range(8):
        bench.run(f"r{number}", ramp(3, 100 * number), sampling=None if number else PENALTY)
    first, second = bench.plan(), bench.plan()
    assert [len(plan.steps) for plan in (first, second)] == [8, 7]
    assert "r0" not in [name for name, _, _ in fed(second)]
    bench.commit(first)
    third = bench.plan()
    assert ("r0", 8, 4) in fed(third)
    assert ("r1", PENDING, 5) in fed(third)


def test_where_many_need_their_history_the_batch_stays_together() -> None:
    bench = Bench(in_flight=2)
    for name, sampling in (("a", None), ("b", PENALTY), ("c", None)):
        bench.run(name, ramp(3, ord(name)), sampling=sampling)
    first = bench.plan()
    assert fed(bench.plan()) == []
    bench.commit(first)
    assert fed(bench.plan()) == [("a", 8, 4), ("b", 8, 4), ("c", 8, 4)]


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    bench = Bench(num_blocks=5, max_model_len=20, in_flight=2)
    bench.run("a", ramp(6))
    bench.run("b", ramp(5, 300))
    plans = [bench.plan(), bench.plan()]
    for token_id in range(20, 22):
        bench.commit(plans.pop(0), token_id)
        plans.append(bench.plan())
    assert [fed(plan) for plan in plans] == [[("a", PENDING, 8), ("b", PENDING, 7)], []]  # b wants a block, and there is none
    assert plans[1].preempted == ()
    bench.commit(plans[0])
    plan = bench.plan()
    assert fed(plan) == [("a", 8, 9)]
    assert [request.request_id for request in plan.preempted] == ["b"]


# --- failing ------------------------------------------------------------------------------------------------------------


def test_of_a_failed_step_only_the_culprit_ends() -> None:
    bench = Bench()
    for name in "abcd":
        bench.run(name, ramp(3, ord(name)))
    assert bench.retract(bench.plan()) == []
    tried = [plan := bench.plan()]
    bench.commit(plan)  # a and b
    tried.append(plan := bench.plan())
    assert bench.retract(plan) == []  # c and d
    tried.append(plan := bench.plan())
    assert bench.retract(plan) == ["c"]
    tried.append(plan := bench.plan())
    bench.commit(plan)
    assert [fed(plan) for plan in tried] == [[("a", 7, 3), ("b", 7, 3)], [("c", 7, 3), ("d", 7, 3)], [("c", 7, 3)], [("d", 7, 3)]]
    assert bench.step() == [("a", 8, 4), ("b", 8, 4), ("d", 8, 4)]


def test_a_step_that_follows_a_failed_one_counts_for_nothing() -> None:
    bench = Bench(in_flight=2)
    request = bench.run("a", ramp(7))
    bench.run("b", ramp(7, 300))
    first = bench.plan()
    bench.scheduler.abort(RequestId("b"))
    newcomer = bench.run("c", ramp(7, 600))
    second = bench.plan()
    assert bench.retract(first) == []
    assert fed(bench.plan()) == []  # while the second is in flight, what it feeds is unknown
    assert bench.commit(second, 33) == (DecodeOutput(newcomer, 1, Token(33)),)
    assert fed(bench.plan()) == [("a", 7, 7)]
    assert request.output_token_ids.tolist() == [7]


def test_nobody_is_blamed_for_a_step_that_was_shared_with_one_who_has_left() -> None:
    bench = Bench()
    for name in "ab":
        bench.run(name, ramp(7, ord(name)))
    plan = bench.plan()
    bench.scheduler.abort(RequestId("a"))
    assert bench.retract(plan) == []
    assert bench.step() == [("b", 7, 7)]


def test_when_every_step_fails_everybody_ends_after_a_bounded_number_of_them() -> None:
    bench = Bench(in_flight=2)
    for name in "abcde":
        bench.run(name, ramp(3, ord(name)))
    plans = [bench.plan(), bench.plan()]
    blamed: list[str] = []
    num_failed = 0
    while plans:
        blamed += bench.retract(plans.pop(0))
        num_failed += 1
        plans += [plan for plan in [bench.plan()] if plan.steps]
        assert num_failed < 12
    assert sorted(blamed) == list("abcde")
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()


# --- leaving ------------------------------------------------------------------------------------------------------------


def test_blocks_under_a_running_step_are_not_given_away() -> None:
    bench = Bench(num_blocks=8)
    bench.run("a", ramp(12))
    plan = bench.plan()
    assert bench.scheduler.abort(RequestId("a"))
    bench.check()
    assert bench.pool.num_free == 4
    assert not bench.scheduler.is_idle()
    assert bench.commit(plan) == ()
    assert bench.pool.is_idle()
    assert bench.scheduler.is_idle()


def test_a_newer_epoch_may_come_while_the_older_is_in_flight() -> None:
    bench = Bench()
    bench.run("a", ramp(7))
    plan = bench.plan()
    newer = bench.run("a", ramp(7), epoch=2)
    assert bench.commit(plan) == ()
    assert newer.num_tokens == 8
    assert bench.step() == [("a", 7, 7)]


@pytest.mark.parametrize("state", ["waiting", "receiving", "running"])
def test_abort_gives_everything_back_in_any_state(state: str) -> None:
    bench = Bench()
    bench.add("a", ramp(9))
    if state != "waiting":
        bench.reserve()
    if state == "running":
        bench.scheduler.handoff(RequestId("a"), 9, Token(7))
    assert not bench.scheduler.abort(RequestId("a"), epoch=0)
    assert bench.scheduler.abort(RequestId("a"), epoch=1)
    assert not bench.scheduler.abort(RequestId("a"))
    assert bench.scheduler.is_idle()
    assert bench.pool.is_idle()
    bench.check()


def test_counts_tell_how_far_each_request_has_come() -> None:
    bench = Bench(num_blocks=8)
    bench.run("running", ramp(7))
    bench.add("receiving", ramp(7, 300))
    bench.reserve()
    bench.add("waiting", ramp(31, 600))
    bench.add("behind it", ramp(7, 900))
    bench.reserve()
    counts = (bench.scheduler.num_waiting, bench.scheduler.num_receiving, bench.scheduler.num_running)
    assert counts == (2, 1, 1)


# --- a shared pool ------------------------------------------------------------------------------------------------------


def test_a_finished_prefills_table_is_adopted_as_it_is() -> None:
    bench = Bench()
    table = bench.pool.allocate(2)
    assert table is not None
    request = bench.request("a", ramp(8))
    assert bench.scheduler.adopt(request, table, Token(7))
    bench.check()
    assert bench.step() == [("a", 7, 8)]
    assert request.block_table[:2] == table
    assert len(request.block_table) == 3
    assert bench.pool.lookup(block_hashes(ramp(8), (), BLOCK)) == table


def test_an_adopted_request_may_end_at_once() -> None:
    bench = Bench()
    table = bench.pool.allocate(2)
    assert table is not None
    assert not bench.scheduler.adopt(bench.request("a", ramp(8)), table, Token(EOS))
    assert bench.pool.is_idle()


def test_a_table_that_is_too_short_stays_its_givers() -> None:
    bench = Bench()
    table = bench.pool.allocate(1)
    assert table is not None
    with pytest.raises(InternalError, match="1 blocks cannot hold 8 tokens"):
        bench.scheduler.adopt(bench.request("a", ramp(8)), table, Token(7))
    assert bench.scheduler.is_idle()
    bench.pool.check_integrity([table])


# --- refusing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misuse", "error", "message"),
    [
        (lambda bench: bench.add("b", ramp(32)), PromptTooLong, "32 tokens leave no room for output; the model's context is 32"),
        (lambda bench: bench.add("b", ids()), BadRequest, "0 prompt tokens of 0"),
        (lambda bench: bench.scheduler.add(bench.request("b", ramp(4), num_prompt_tokens=5)), BadRequest, "5 prompt tokens of 4"),
        (lambda bench: bench.add("a", ramp(4), epoch=1), StaleHandle, "is known with epoch 1"),
        (lambda bench: bench.scheduler.handoff(RequestId("a"), 7, Token(7)), StaleHandle, "not waiting for a handoff"),
        (lambda bench: bench.scheduler.handoff(RequestId("unknown"), 7, Token(7)), StaleHandle, "not waiting for a handoff"),
        (lambda bench: bench.scheduler.handoff(RequestId("receiving"), 6, Token(7)), StaleHandle, "KV of 6 tokens came"),
        (lambda bench: bench.plan() and bench.plan(), InternalError, "1 decode steps are not committed yet"),
        (lambda bench: bench.scheduler.commit(bench.plan(), []), InternalError, "0 tokens for 1 sequences"),
        (lambda bench: bench.scheduler.commit(bench.plan(), [None]), InternalError, "drew no token"),
    ],
)
def test_what_cannot_be_is_refused(misuse: Callable[[Bench], object], error: type[EpdError], message: str) -> None:
    bench = Bench()
    bench.add("receiving", ramp(7, 300))
    bench.run("a", ramp(7))
    with pytest.raises(error, match=message):
        misuse(bench)
    bench.check()


def test_a_plan_is_committed_once() -> None:
    bench = Bench()
    bench.run("a", ramp(7))
    plan = bench.plan()
    bench.commit(plan)
    with pytest.raises(InternalError, match="not in flight"):
        bench.commit(plan)


@pytest.mark.parametrize("config", [{"num_blocks": 7}, {"max_running": 0}, {"in_flight": 0}, {"in_flight": 3}])
def test_limits_that_cannot_work_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(BadConfig):
        Bench(**config)


def _forget_a_block(request: DecodeRequest) -> None:
    request.block_table.clear()


def _compute_too_much(request: DecodeRequest) -> None:
    request.num_computed_tokens += 1


@pytest.mark.parametrize("damage", [_forget_a_block, _compute_too_much])
def test_damage_is_found(damage: Callable[[DecodeRequest], None]) -> None:
    bench = Bench()
    request = bench.run("a", ramp(7))
    damage(request)
    with pytest.raises(InternalError, match="decode scheduler: a, RUNNING"):
        bench.scheduler.check_integrity()
