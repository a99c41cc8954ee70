"""What is reported is what the server did: against a real server in real time that keeps its own record, and against a stall.

Server and generator read the same clock in the same event loop. Where the host is late, the server is late too and its record
says so; what remains is the time from a write to the read that follows it, a few turns of the loop, whose longest is measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.tools.loadgen.queue_model import QueueModel
from tests.tools.loadgen.scripted import DONE, finish, piece, usage
from tools.loadgen.arrivals import Rate, arrival_times
from tools.loadgen.campaign import Harness, Load, Measured
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import run_closed_loop, run_open_loop
from tools.loadgen.stats import Distribution, summarise
from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest, WorkloadSpec, draw_chat

SPEC = WorkloadSpec(model="m")


class RecordingServer:
    """Streams tokens with random delays and notes when it wrote each; nobody is answered while it stalls."""

    def __init__(self, seed: int, *, num_tokens: int = 6, delays_s: tuple[float, float] = (0.002, 0.03)) -> None:
        self.writes_s: list[list[float]] = []
        self.ends_s: list[float] = []
        self.arrivals_s: list[float] = []
        self.url = ""
        self.runs = asyncio.Event()
        self.runs.set()
        self._rng = random.Random(seed)
        self._num_tokens = num_tokens
        self._delays_s = delays_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[RecordingServer]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        async with TestServer(app) as server:
            self.url = str(server.make_url("/v1"))
            yield self

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.arrivals_s.append(time.perf_counter())
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        writes_s: list[float] = []
        for _ in range(self._num_tokens):
            await asyncio.sleep(self._rng.uniform(*self._delays_s))
            await self.runs.wait()
            writes_s.append(time.perf_counter())
            await response.write(piece("word "))
        self.ends_s.append(time.perf_counter())
        await response.write(finish() + usage(5, self._num_tokens) + DONE)
        self.writes_s.append(writes_s)
        return response


class LoopWatch:
    """How long a turn of the event loop took at most, while it is entered."""

    def __init__(self) -> None:
        self._longest_s = 0.0

    @property
    def read_lag_s(self) -> float:
        """The longest time from a write to when its reader has run: the socket, the waiter and its task take a turn each."""
        return 3 * self._longest_s

    async def __aenter__(self) -> LoopWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        before_s = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now_s = time.perf_counter()
            self._longest_s = max(self._longest_s, now_s - before_s)
            before_s = now_s


def check(name: str, found: Distribution, truth_s: Sequence[float], lag_s: float) -> None:
    """Within 1 % or 1 ms of the server's record, beside what the host took from a write to its read."""
    assert found.count == len(truth_s)
    truth = {f"p{percent}": float(np.percentile(truth_s, percent)) for percent in (50, 90, 95, 99)}
    truth |= {"mean": float(np.mean(truth_s)), "max": max(truth_s)}
    for figure, value in truth.items():
        measured = getattr(found, f"{figure}_s")
        assert abs(measured - value) <= max(0.001, 0.01 * value) + lag_s, f"{name} {figure}: {measured} instead of {value}"


async def measure(server: RecordingServer, load: Load) -> Measured:
    async with open_session() as session:
        client = Client(session, server.url, timeout_s=60.0, clock=time.perf_counter)
        return await Harness(client, SPEC).measure(load)


async def test_the_percentiles_of_a_real_server() -> None:
    async with RecordingServer(1).running() as server, LoopWatch() as watch:
        measured = await measure(server, Load(concurrency=6, num_chats=90))
    summary = measured.summary
    assert summary.num_ok == 90
    lag_s = watch.read_lag_s
    check("ITL", summary.itl, [after - before for writes in server.writes_s for before, after in pairwise(writes)], lag_s)
    # The server does not know when a request was sent; it knows when it came.
    firsts, arrivals = np.sort([writes[0] for writes in server.writes_s]), np.sort(server.arrivals_s)
    assert summary.ttft.mean_s == pytest.approx(float(np.mean(firsts) - np.mean(arrivals)), abs=0.001 + lag_s, rel=0.01)
    assert summary.e2e.mean_s == pytest.approx(float(np.mean(server.ends_s) - np.mean(arrivals)), abs=0.001 + lag_s, rel=0.01)


async def test_a_stall_shows_in_every_request_that_was_due_in_it() -> None:
    """60 requests/s for 1.2 s; for 0.4 s of it nobody is answered. A third of the requests meets the stall."""
    async with RecordingServer(2, num_tokens=1, delays_s=(0.001, 0.004)).running() as server, open_session() as session:
        client = Client(session, server.url, timeout_s=60.0, clock=time.perf_counter)
        loop = asyncio.get_running_loop()
        arrivals = arrival_times(Rate(60.0, 60.0), burstiness=0.0, duration_s=1.2)

        def begin_stall(record: Record) -> None:
            if record.index == 20:
                server.runs.clear()
                loop.call_later(0.4, server.runs.set)

        async with LoopWatch() as watch:
            run = await run_open_loop(client, lambda index: draw_chat(SPEC, index), arrivals, progress=begin_stall)
    summary = summarise(run)
    assert summary.num_ok == len(arrivals)
    # Answers leave in the order of their requests but for the few that were under way together, which does not move a percentile.
    due_s = np.asarray(arrivals) + run.start_s
    truth_s = np.sort([writes[0] for writes in server.writes_s]) - due_s
    check("TTFT", summary.ttft, list(truth_s), watch.read_lag_s + 0.004)
    assert summary.ttft.p99_s > 0.3
    assert summary.ttft.p90_s > 0.15


class Stalling(QueueModel):
    """A queue that serves nobody from second 2 to second 4 of the run."""

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
        if 1002.0 <= max(self.clock.now_s, self._free_at_s) < 1004.0:
            self._free_at_s = 1004.0
        return await super().ask(request, scheduled_s, keeps_text=keeps_text)


def stalled_latencies(arrivals: Sequence[float], service_s: float) -> list[float]:
    """E2E of each arrival, computed by hand."""
    free_at_s, latencies = 0.0, []
    for due_s in arrivals:
        start_s = max(due_s, free_at_s)
        start_s = 4.0 if 2.0 <= start_s < 4.0 else start_s
        free_at_s = start_s + service_s
        latencies.append(free_at_s - due_s)
    return latencies


async def test_an_open_loop_omits_nothing_and_a_closed_one_does() -> None:
    service_s = 0.001
    arrivals = arrival_times(Rate(50.0, 50.0), seed=4, duration_s=10.0)
    model = Stalling(service_s)

    async def run_open(oversleep_at: int = -1) -> Distribution:
        model.clock.now_s = 1000.0
        sleeps = 0

        async def sleep(delay_s: float) -> None:
            nonlocal sleeps
            sleeps += 1
            await model.sleep(delay_s + (1.5 if sleeps == oversleep_at else 0.0))

        run = await run_open_loop(model, lambda index: draw_chat(SPEC, index), arrivals, clock=model.clock, sleep=sleep)
        return summarise(run).e2e

    found = await run_open()
    known = stalled_latencies(arrivals, service_s)
    assert found.mean_s == pytest.approx(float(np.mean(known)))
    for percent, measured in ((50, found.p50_s), (90, found.p90_s), (95, found.p95_s), (99, found.p99_s)):
        assert measured == pytest.approx(float(np.percentile(known, percent))), percent
    assert found.p90_s > 0.8

    # A generator that is late itself hides nothing: everybody who was due meanwhile waited.
    late = await run_open(oversleep_at=400)
    assert late.mean_s > found.mean_s + 0.05

    model.clock.now_s = 1000.0
    closed = await run_closed_loop(
        model, lambda index: draw_chat(SPEC, index), concurrency=1, num_chats=2600, clock=model.clock, sleep=model.sleep
    )
    assert summarise(closed).e2e.p99_s == pytest.approx(service_s), "one user in a stall asks once, and its percentiles look fine"
