"""Drives the load: a closed loop of N users, or an open loop of given arrival times. Collects the records.

Chats are drawn ahead in threads, so that drawing images takes no time from sending. How late this program itself was is part of
the result: `Run.loop_lags_s`, `Run.cpu_s` and the `sent_s - scheduled_s` of each record.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from tools.loadgen.stream import OK, Record
from tools.loadgen.workload import Chat, LoadRequest

_LAG_PROBE_S = 0.02
_DRAWN_AHEAD = 64
_DRAWING_THREADS = 2

Clock = Callable[[], float]
Draw = Callable[[int], Chat]
Progress = Callable[[Record], None]
Sleep = Callable[[float], Awaitable[None]]


class Asker(Protocol):
    """What sends a request: tools.loadgen.client.Client."""

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record: ...

    def cut_off(self) -> None: ...

    def reopen(self) -> None: ...


@dataclass(slots=True)
class Run:
    """All that was measured, from `start_s` to `end_s`, when the last request had ended."""

    start_s: float = 0.0
    end_s: float = 0.0
    started_at: float = 0.0  # unix time
    records: list[Record] = field(default_factory=list)
    loop_lags_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0  # of this process, all threads
    was_cut: bool = False  # ended by `Limits.stop` or `Limits.drain_s`

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a run early, beside the end of its chats."""

    duration_s: float | None = None  # no chat starts after it
    drain_s: float | None = None  # for requests that run when the last chat has started; then they are cut off
    stop: asyncio.Event | None = None  # set: no chat starts any more, and what runs is cut off


async def run_closed_loop(
    client: Asker,
    draw: Draw,
    *,
    concurrency: int,
    num_chats: int | None = None,
    limits: Limits | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda record: None,
    stagger_s: float = 0.0,
    sleep: Sleep = asyncio.sleep,
) -> Run:
    """`concurrency` users, each of whom begins another chat as soon as the one before is over; user i comes after
    i * `stagger_s`.

    No chat starts after `num_chats` of them or after the duration; those that run then are waited for.
    """
    limits = limits or Limits()
    indexes: Iterator[int] = itertools.count() if num_chats is None else iter(range(num_chats))
    async with _Drawer(draw, indexes, max(_DRAWN_AHEAD, concurrency)) as next_chat, _measured(client, limits, clock) as run:

        async def user(number: int) -> None:
            await sleep(number * stagger_s)
            while not _is_over(run, limits, clock):
                chat = await next_chat()
                if chat is None:
                    return
                await _converse(client, chat, None, run, limits, clock, progress, sleep)

        async with asyncio.TaskGroup() as users:
            for number in range(concurrency):
                users.create_task(user(number), name=f"user-{number}")
            if limits.duration_s is not None and limits.drain_s is not None:
                asyncio.get_running_loop().call_later(limits.duration_s + limits.drain_s, _cut, client, run)
    return run


async def run_open_loop(
    client: Asker,
    draw: Draw,
    arrivals: Sequence[float],
    *,
    limits: Limits | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda record: None,
    sleep: Sleep = asyncio.sleep,
) -> Run:
    """Chat i begins `arrivals[i]` seconds after the start, however many are still running, and is timed from then.

    A later turn of a chat is due when its user has thought, and is timed from then.
    """
    limits = limits or Limits()
    async with _Drawer(draw, iter(range(len(arrivals))), _DRAWN_AHEAD) as next_chat, _measured(client, limits, clock) as run:

        async def send(chat: Chat, due_s: float) -> None:
            await _converse(client, chat, due_s, run, limits, clock, progress, sleep)

        async with asyncio.TaskGroup() as chats:
            for arrival_s in arrivals:
                chat = await next_chat()
                assert chat is not None
                due_s = run.start_s + arrival_s
                await sleep(max(0.0, due_s - clock()))  # also when late: the requests before this one must get out
                if _is_over(run, limits, clock, due_s):
                    break
                chats.create_task(send(chat, due_s), name=f"chat-{chat.index}")
            if limits.drain_s is not None:
                asyncio.get_running_loop().call_later(limits.drain_s, _cut, client, run)
    return run


async def _converse(
    client: Asker, chat: Chat, due_s: float | None, run: Run, limits: Limits, clock: Clock, progress: Progress, sleep: Sleep
) -> None:
    """All turns of a chat, or as many as succeed."""
    answers: list[str] = []
    for number, turn in enumerate(chat.turns):
        if number:
            await sleep(turn.think_s)
            if _is_over(run, limits, clock):
                return
        is_last = number == len(chat.turns) - 1
        record = await client.ask(chat.request(answers), due_s, keeps_text=not is_last)
        run.records.append(record)
        progress(record)
        if is_last or record.outcome != OK or run.was_cut:
            return
        answers.append(record.text)
        due_s = record.end_s + chat.turns[number + 1].think_s


def _is_over(run: Run, limits: Limits, clock: Clock, due_s: float | None = None) -> bool:
    if run.was_cut:
        return True
    at_s = clock() if due_s is None else due_s
    return limits.duration_s is not None and at_s - run.start_s >= limits.duration_s


def _cut(client: Asker, run: Run) -> None:
    if not run.end_s:
        run.was_cut = True
        client.cut_off()


@asynccontextmanager
async def _measured(client: Asker, limits: Limits, clock: Clock) -> AsyncIterator[Run]:
    """A run from its start to its end, with how late the event loop was meanwhile."""
    run = Run(started_at=time.time())
    client.reopen()

    async def probe_lag() -> None:
        """The time by which a short sleep overshoots."""
        while True:
            before_s = clock()
            await asyncio.sleep(_LAG_PROBE_S)
            run.loop_lags_s.append(max(0.0, clock() - before_s - _LAG_PROBE_S))

    async def watch_stop(stop: asyncio.Event) -> None:
        await stop.wait()
        _cut(client, run)

    helpers = [asyncio.create_task(probe_lag(), name="lag-probe")]
    if limits.stop is not None:
        helpers.append(asyncio.create_task(watch_stop(limits.stop), name="stop"))
    cpu_before_s = time.process_time()
    run.start_s = clock()
    try:
        yield run
        run.end_s = clock()
        run.cpu_s = time.process_time() - cpu_before_s
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)


class _Drawer:
    """Hands out the chats in order, None after the last one; draws up to `ahead` of them before they are asked for.

    Entering waits for the first ones, so that the start of a run is not spent on drawing.
    """

    def __init__(self, draw: Draw, indexes: Iterator[int], ahead: int) -> None:
        self._draw = draw
        self._indexes = indexes
        self._pool = ThreadPoolExecutor(_DRAWING_THREADS, thread_name_prefix="draw")
        self._drawn: asyncio.Queue[asyncio.Future[Chat] | None] = asyncio.Queue(ahead)

    async def __aenter__(self) -> Callable[[], Awaitable[Chat | None]]:
        first = [self._begin(index) for index in itertools.islice(self._indexes, self._drawn.maxsize)]
        if first:
            await asyncio.wait(first)
        for future in first:
            self._drawn.put_nowait(future)
        self._task = asyncio.create_task(self._fill(), name="drawer")
        return self._next

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, index: int) -> asyncio.Future[Chat]:
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._draw, index)
        future.add_done_callback(_look_at)
        return future

    async def _fill(self) -> None:
        for index in self._indexes:
            await self._drawn.put(self._begin(index))
        while True:  # every user meets the end
            await self._drawn.put(None)

    async def _next(self) -> Chat | None:
        drawn = await self._drawn.get()
        return None if drawn is None else await drawn


def _look_at(future: asyncio.Future[Chat]) -> None:
    """An error in drawing is raised where the chat is asked for; one that nobody asks for any more does not matter."""
    if not future.cancelled():
        future.exception()
