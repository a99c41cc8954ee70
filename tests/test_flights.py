"""Steps in flight: told in order and once, kept until they are back, waited for at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from epd.flights import Flights
from epd.step import SequenceStep, StepOutput, StepPlan
from gpu.stream import HostStream
from protocol.messages import RequestId, Token
from tests.support.clock import FakeClock


class Runner:
    """Each step waits for its turn to be given with `go`; the plan's first token is what it draws."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.num_done = 0

    def execute(self, plan: StepPlan) -> StepOutput:
        self.begun.release()
        assert self.go.acquire(timeout=20)
        self.num_done += 1
        token_id = int(plan.sequences[0].token_ids[0])
        if token_id < 0:
            raise ValueError("no such token")
        return StepOutput((Token(token_id),), 0.0)

    def close(self) -> None:
        pass


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock(0.0)
        self.runner = Runner()
        self.stream = HostStream("test")
        self.woken = asyncio.Event()
        self.flights: Flights[str] = Flights(self.stream, self.runner, wake=self.woken.set, clock=self.clock)

    def launch(self, name: str, token_id: int) -> None:
        self.flights.launch(name, lambda _: _plan(token_id))

    async def let_land(self) -> list[tuple[str, float, float, object]]:
        """Let one more step come back: (plan, begin, end, token or type of error) of all that is told then."""
        self.woken.clear()
        self.runner.go.release()
        await asyncio.wait_for(self.woken.wait(), 20)
        return self.landed()

    def landed(self) -> list[tuple[str, float, float, object]]:
        return [
            (
                landing.plan,
                landing.began_s,
                landing.landed_s,
                type(landing.output) if isinstance(landing.output, Exception) else landing.output.tokens[0],
            )
            for landing in self.flights.landed()
        ]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    for _ in range(8):
        made.runner.go.release()
    made.stream.close()


def _plan(token_id: int) -> StepPlan:
    ids = np.array([token_id], np.int32)
    return StepPlan((SequenceStep(RequestId("a"), ids, 0, np.zeros((3, 1), np.int32), np.zeros(1, np.int32)),))


async def test_steps_are_told_in_order_and_once(bench: Bench) -> None:
    bench.launch("first", 5)
    bench.launch("second", 6)
    assert (len(bench.flights), bench.landed()) == (2, [])
    bench.clock.now = 3.0
    assert await bench.let_land() == [("first", 0.0, 3.0, Token(5))]
    assert bench.landed() == []
    bench.clock.now = 4.0
    assert await bench.let_land() == [("second", 3.0, 4.0, Token(6))]  # it had the stream to itself from 3.0 on
    assert len(bench.flights) == 0


async def test_a_failing_step_lands_with_its_error_and_the_next_one_goes_on(bench: Bench) -> None:
    bench.launch("bad", -1)
    bench.launch("good", 6)
    assert [landing[0::3] for landing in await bench.let_land()] == [("bad", ValueError)]
    assert [landing[0::3] for landing in await bench.let_land()] == [("good", Token(6))]


async def test_a_step_that_cannot_be_described_lands_too(bench: Bench) -> None:
    bench.launch("first", 5)
    none: dict[str, StepPlan] = {}
    bench.flights.launch("impossible", lambda plan: none[plan])
    await asyncio.wait_for(bench.woken.wait(), 20)
    assert bench.landed() == []  # it is not its turn yet
    assert [landing[0::3] for landing in await bench.let_land()] == [("first", Token(5)), ("impossible", KeyError)]


async def test_settling_drops_what_has_not_begun_and_waits_for_what_has(bench: Bench) -> None:
    bench.launch("begun", 5)
    bench.launch("waiting", 6)
    assert await asyncio.to_thread(bench.runner.begun.acquire, timeout=20)
    settling = asyncio.create_task(bench.flights.settle())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not settling.done()
    bench.runner.go.release()
    await settling
    bench.stream.close()
    assert not bench.runner.begun.acquire(blocking=False)
    assert bench.runner.num_done == 1
    assert bench.landed() == []
