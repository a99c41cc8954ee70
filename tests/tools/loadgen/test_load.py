from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from tests.tools.loadgen.scripted import VirtualClock
from tools.loadgen.load import Limits, run_closed_loop, run_open_loop
from tools.loadgen.stream import Record
from tools.loadgen.workload import Chat, LoadRequest, Turn


def draw(index: int) -> Chat:
    return chat_of(index, [0.0])


def chat_of(index: int, thinks_s: list[float]) -> Chat:
    return Chat(
        index, "text", tuple(Turn(b'"q%d"' % number, 4, think_s=s) for number, s in enumerate(thinks_s)), b'{"model": "m"'
    )


@dataclass
class Asker:
    """Answers when `hold` lets it; every answer takes `service_s` of virtual time. Knows how many were asked at once."""

    clock: VirtualClock
    service_s: float = 0.0
    outcomes: dict[int, str] = field(default_factory=dict)
    asked: list[LoadRequest] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0
    num_cut: int = 0

    def __post_init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.is_cut_off = False

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
        sent_s = self.clock()
        self.asked.append(request)
        self.kept.append(keeps_text)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await asyncio.sleep(0)
        await self.hold.wait()
        self.clock.now_s += self.service_s
        self.num_running -= 1
        due_s = sent_s if scheduled_s is None else scheduled_s
        outcome = "failed" if self.is_cut_off else self.outcomes.get(request.index, "ok")
        return Record(
            request.index, due_s, sent_s, turn=request.turn, outcome=outcome, end_s=self.clock(), text=f"a{request.turn}"
        )

    def cut_off(self) -> None:
        self.num_cut += 1
        self.is_cut_off = True
        self.hold.set()

    def reopen(self) -> None:
        self.is_cut_off = False


async def test_a_closed_loop_keeps_its_number_of_users_busy() -> None:
    clock = VirtualClock()
    asker = Asker(clock, service_s=0.5)
    seen: list[int] = []
    run = await run_closed_loop(
        asker, draw, concurrency=3, num_chats=10, clock=clock, progress=lambda record: seen.append(record.index)
    )
    assert asker.max_running == 3
    assert sorted(request.index for request in asker.asked) == list(range(10))
    assert sorted(seen) == list(range(10))
    assert all(record.scheduled_s == record.sent_s for record in run.records)
    assert run.wall_s == pytest.approx(10 * 0.5)


async def test_a_closed_loop_ends_after_its_duration() -> None:
    clock = VirtualClock()
    run = await run_closed_loop(Asker(clock, service_s=0.5), draw, concurrency=2, limits=Limits(duration_s=4.5), clock=clock)
    assert len(run.records) == pytest.approx(9, abs=2)
    assert max(record.sent_s for record in run.records) - 1000.0 < 4.5
    assert run.wall_s >= 4.5


async def test_users_of_a_closed_loop_come_one_after_another() -> None:
    clock = VirtualClock()
    waits: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)

    await run_closed_loop(Asker(clock), draw, concurrency=3, num_chats=3, clock=clock, stagger_s=0.5, sleep=sleep)
    assert waits == [0.0, 0.5, 1.0]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    clock = VirtualClock()
    asker = Asker(clock)
    asker.hold.clear()
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        clock.now_s += delay_s
        if len(slept) == 4:  # the last one is due: only now may anything be answered
            asker.hold.set()

    run = await run_open_loop(asker, draw, [0.5, 0.75, 2.0, 4.0], clock=clock, sleep=sleep)
    assert slept == pytest.approx([0.5, 0.25, 1.25, 2.0])
    assert asker.max_running >= 3
    assert sorted(record.scheduled_s - 1000.0 for record in run.records) == pytest.approx([0.5, 0.75, 2.0, 4.0])
    assert run.wall_s == pytest.approx(4.0)


async def test_a_late_sender_shows_and_does_not_shift_what_is_due() -> None:
    clock = VirtualClock()
    asker = Asker(clock)

    async def oversleep(delay_s: float) -> None:
        await asyncio.sleep(0)  # what is due before this is sent now
        clock.now_s += delay_s + 0.3 if delay_s else 0.0

    run = await run_open_loop(asker, draw, [1.0, 1.1, 5.0], clock=clock, sleep=oversleep)
    records = sorted(run.records, key=lambda record: record.index)
    assert [record.scheduled_s - 1000.0 for record in records] == pytest.approx([1.0, 1.1, 5.0])
    assert [record.sent_s - record.scheduled_s for record in records] == pytest.approx([0.3, 0.2, 0.3])


async def test_a_chat_asks_turn_by_turn_and_thinks_between() -> None:
    clock = VirtualClock()
    asker = Asker(clock, service_s=1.0)

    async def sleep(delay_s: float) -> None:
        clock.now_s += delay_s + (0.25 if delay_s > 1 else 0.0)

    run = await run_open_loop(asker, lambda index: chat_of(index, [0.0, 2.0, 3.0]), [0.5], clock=clock, sleep=sleep)
    # Due at 0.5, answered at 1.5; thought until 3.5, asked 0.25 late, answered at 4.75; thought until 7.75.
    assert [record.scheduled_s - 1000.0 for record in run.records] == pytest.approx([0.5, 3.5, 7.75])
    assert [record.sent_s - record.scheduled_s for record in run.records] == pytest.approx([0.0, 0.25, 0.25])
    assert [record.turn for record in run.records] == [0, 1, 2]
    said = [message["content"] for message in json.loads(asker.asked[2].body)["messages"]]
    assert said == ["q0", "a0", "q1", "a1", "q2"]
    assert asker.kept == [True, True, False]


async def test_a_chat_that_fails_is_over() -> None:
    clock = VirtualClock()
    asker = Asker(clock, outcomes={1: "failed"})
    run = await run_closed_loop(asker, lambda index: chat_of(index, [0.0, 0.0]), concurrency=1, num_chats=3, clock=clock)
    turns = defaultdict(list)
    for record in run.records:
        turns[record.index].append(record.turn)
    assert turns == {0: [0, 1], 1: [0], 2: [0, 1]}


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_run_can_be_stopped(is_open: bool) -> None:
    clock = VirtualClock()
    asker = Asker(clock)
    stop = asyncio.Event()

    def progress(record: Record) -> None:
        if record.index == 2:
            asker.hold.clear()  # whoever is asked now gets no answer
            stop.set()

    if is_open:
        run = await run_open_loop(asker, draw, [0.0] * 50, limits=Limits(stop=stop), clock=clock, progress=progress)
    else:
        run = await run_closed_loop(asker, draw, concurrency=2, limits=Limits(stop=stop), clock=clock, progress=progress)
    assert run.was_cut
    assert asker.num_cut == 1
    assert len(run.records) == len(asker.asked)
    assert [record.outcome for record in run.records].count("failed") == len(asker.asked) - [
        record.outcome for record in run.records
    ].count("ok")
    if not is_open:
        assert len(run.records) <= 6


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_run_waits_no_longer_than_it_may_for_its_last_requests(is_open: bool) -> None:
    clock = VirtualClock()
    asker = Asker(clock)
    asker.hold.clear()
    limits = Limits(duration_s=0.0 if not is_open else None, drain_s=0.01)
    if is_open:
        run = await run_open_loop(asker, draw, [0.0, 0.0], limits=limits, clock=clock)
        assert [record.outcome for record in run.records] == ["failed", "failed"]
        assert run.was_cut
    else:
        run = await run_closed_loop(asker, draw, concurrency=2, limits=limits, clock=clock)
        assert run.records == []
    await asyncio.sleep(0.02)
    assert asker.num_cut == is_open, "a run that has ended is not cut off"


async def test_an_error_in_drawing_ends_the_run() -> None:
    def broken(index: int) -> Chat:
        if index == 2:
            raise RuntimeError("no paint")
        return draw(index)

    clock = VirtualClock()
    with pytest.raises(ExceptionGroup) as caught:
        await run_closed_loop(Asker(clock), broken, concurrency=1, num_chats=5, clock=clock)
    assert "no paint" in str(caught.value.exceptions[0])
    with pytest.raises(ExceptionGroup):
        await run_open_loop(Asker(clock), broken, [0.0] * 5, clock=clock)


async def test_chats_are_drawn_before_the_start() -> None:
    clock = VirtualClock()
    drawn: list[int] = []
    started_with: list[int] = []

    def slow_draw(index: int) -> Chat:
        drawn.append(index)
        return draw(index)

    class First(Asker):
        async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
            started_with.append(len(drawn))
            return await super().ask(request, scheduled_s)

    await run_closed_loop(First(clock), slow_draw, concurrency=1, num_chats=20, clock=clock)
    assert started_with[0] == 20
