from __future__ import annotations

import asyncio

import pytest

from tests.tools.loadgen.scripted import VirtualClock
from tools.loadgen.load import run_closed_loop, run_open_loop
from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest


def draw(index: int) -> LoadRequest:
    return LoadRequest(index=index, body=b"")


class Asker:
    """Answers when `hold` lets it; every answer takes `service_s` of virtual time. Knows how many were asked at once."""

    def __init__(self, clock: VirtualClock, *, service_s: float = 0.0) -> None:
        self.clock = clock
        self.service_s = service_s
        self.hold = asyncio.Event()
        self.hold.set()
        self.num_running = 0
        self.max_running = 0
        self.asked: list[int] = []

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None) -> Record:
        sent_s = self.clock()
        self.asked.append(request.index)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await asyncio.sleep(0)
        await self.hold.wait()
        self.clock.now_s += self.service_s
        self.num_running -= 1
        return Record(
            request.index,
            sent_s if scheduled_s is None else scheduled_s,
            sent_s,
            outcome="ok",
            end_s=self.clock(),
            piece_times_s=[sent_s],
        )


async def test_a_closed_loop_keeps_its_number_of_users_busy() -> None:
    clock = VirtualClock()
    asker = Asker(clock, service_s=0.5)
    seen: list[int] = []
    run = await run_closed_loop(
        asker,
        draw,
        concurrency=3,
        num_requests=10,
        duration_s=None,
        clock=clock,
        progress=lambda record: seen.append(record.index),
    )
    assert sorted(asker.asked) == list(range(10))
    assert asker.max_running == 3
    assert [record.index for record in run.records] == seen
    assert run.wall_s == pytest.approx(10 * 0.5)


async def test_a_closed_loop_starts_nothing_after_its_duration() -> None:
    clock = VirtualClock()
    asker = Asker(clock, service_s=1.0)
    run = await run_closed_loop(asker, draw, concurrency=2, num_requests=None, duration_s=4.5, clock=clock)
    # Two users at a time; each answer moves the clock by 1 s, so the last requests start at 4 s and end after it.
    assert 5 <= len(run.records) <= 6
    assert max(record.sent_s for record in run.records) - 1000.0 < 4.5
    assert run.wall_s >= 4.5


async def test_users_of_a_closed_loop_come_one_after_another() -> None:
    clock = VirtualClock()
    waits: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)

    await run_closed_loop(
        Asker(clock), draw, concurrency=3, num_requests=3, duration_s=None, clock=clock, stagger_s=0.5, sleep=sleep
    )
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


async def test_an_error_in_drawing_ends_the_run() -> None:
    def broken(index: int) -> LoadRequest:
        if index == 2:
            raise RuntimeError("no paint")
        return draw(index)

    clock = VirtualClock()
    with pytest.raises(ExceptionGroup) as caught:
        await run_closed_loop(Asker(clock), broken, concurrency=1, num_requests=5, duration_s=None, clock=clock)
    assert "no paint" in str(caught.value.exceptions[0])
    with pytest.raises(ExceptionGroup):
        await run_open_loop(Asker(clock), broken, [0.0] * 5, clock=clock)


async def test_requests_are_drawn_before_the_start() -> None:
    clock = VirtualClock()
    drawn: list[int] = []
    started_with: list[int] = []

    def slow_draw(index: int) -> LoadRequest:
        drawn.append(index)
        return draw(index)

    class First(Asker):
        async def ask(self, request: LoadRequest, scheduled_s: float | None = None) -> Record:
            started_with.append(len(drawn))
            return await super().ask(request, scheduled_s)

    await run_closed_loop(First(clock), slow_draw, concurrency=1, num_requests=20, duration_s=None, clock=clock)
    assert started_with[0] == 20
