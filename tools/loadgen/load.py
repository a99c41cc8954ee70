"""Drives the load: a closed loop of N users, or an open loop of given arrival times. Collects the records.

Requests are drawn ahead in a thread, so that drawing images takes no time from sending. How late this program itself was is part
of the result: `Run.loop_lags_s` and the `sent_s - scheduled_s` of each record.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest

_LAG_PROBE_S = 0.02
_DRAWN_AHEAD = 64

Clock = Callable[[], float]
Draw = Callable[[int], LoadRequest]
Progress = Callable[[Record], None]


class Asker(Protocol):
    """What sends a request: tools.loadgen.client.Client."""

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None) -> Record: ...


@dataclass(slots=True)
class Run:
    """All that was measured. `wall_s` runs from the start to the end of the last request."""

    records: list[Record] = field(default_factory=list)
    wall_s: float = 0.0
    loop_lags_s: list[float] = field(default_factory=list)


async def run_closed_loop(
    client: Asker,
    draw: Draw,
    *,
    concurrency: int,
    num_requests: int | None,
    duration_s: float | None,
    clock: Clock,
    progress: Progress = lambda record: None,
    stagger_s: float = 0.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Run:
    """`concurrency` users, each of whom asks again as soon as the answer before is there; user i comes after i * `stagger_s`.

    No request starts after `num_requests` of them or after `duration_s`; those that run then are waited for.
    """
    run = Run()
    indexes: Iterator[int] = itertools.count() if num_requests is None else iter(range(num_requests))
    async with _Drawer(draw, indexes, max(_DRAWN_AHEAD, concurrency)) as next_request, _LagProbe(run, clock):
        start_s = clock()

        async def user(number: int) -> None:
            await sleep(number * stagger_s)
            while duration_s is None or clock() - start_s < duration_s:
                request = await next_request()
                if request is None:
                    return
                record = await client.ask(request)
                run.records.append(record)
                progress(record)

        async with asyncio.TaskGroup() as users:
            for number in range(concurrency):
                users.create_task(user(number), name=f"user-{number}")
        run.wall_s = clock() - start_s
    return run


async def run_open_loop(
    client: Asker,
    draw: Draw,
    arrivals: Iterable[float],
    *,
    clock: Clock,
    progress: Progress = lambda record: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Run:
    """Request i is sent `arrivals[i]` seconds after the start, however many are still running, and is timed from then."""
    run = Run()
    due_times = list(arrivals)
    async with _Drawer(draw, iter(range(len(due_times))), _DRAWN_AHEAD) as next_request, _LagProbe(run, clock):
        start_s = clock()

        async def send(request: LoadRequest, scheduled_s: float) -> None:
            record = await client.ask(request, scheduled_s)
            run.records.append(record)
            progress(record)

        async with asyncio.TaskGroup() as requests:
            for due_s in due_times:
                request = await next_request()
                assert request is not None
                await sleep(max(0.0, start_s + due_s - clock()))  # also when late: the requests before this one must get out
                requests.create_task(send(request, start_s + due_s), name=f"request-{request.index}")
        run.wall_s = clock() - start_s
    return run


class _Drawer:
    """Hands out the requests in order, None after the last one; draws up to `ahead` of them before they are asked for.

    Entering waits for the first ones, so that the start of a run is not spent on drawing.
    """

    def __init__(self, draw: Draw, indexes: Iterator[int], ahead: int) -> None:
        self._draw = draw
        self._indexes = indexes
        self._drawn: asyncio.Queue[LoadRequest | Exception | None] = asyncio.Queue(ahead)
        self._is_ahead = asyncio.Event()

    async def __aenter__(self) -> Callable[[], Awaitable[LoadRequest | None]]:
        self._task = asyncio.create_task(self._fill(), name="drawer")
        await self._is_ahead.wait()
        return self._next

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _fill(self) -> None:
        for index in self._indexes:
            drawn: LoadRequest | Exception
            try:
                drawn = await asyncio.to_thread(self._draw, index)
            except Exception as error:  # raised where the request is asked for
                drawn = error
            if self._drawn.full():
                self._is_ahead.set()
            await self._drawn.put(drawn)
        self._is_ahead.set()
        while True:  # every user meets the end
            await self._drawn.put(None)

    async def _next(self) -> LoadRequest | None:
        drawn = await self._drawn.get()
        if isinstance(drawn, Exception):
            raise drawn
        return drawn


class _LagProbe:
    """Measures how late this program's own event loop is: the time by which a short sleep overshoots."""

    def __init__(self, run: Run, clock: Clock) -> None:
        self._run = run
        self._clock = clock

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._probe(), name="lag-probe")

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _probe(self) -> None:
        while True:
            before_s = self._clock()
            await asyncio.sleep(_LAG_PROBE_S)
            self._run.loop_lags_s.append(max(0.0, self._clock() - before_s - _LAG_PROBE_S))
