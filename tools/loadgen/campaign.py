"""One run, a sweep of runs, or the search for the knee: which loads are put on the server, one after another.

Every run draws other prompts and images than the one before, so that none finds the server's caches warm from it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tools.loadgen.arrivals import Rate, arrival_times
from tools.loadgen.knee import KneeSearch
from tools.loadgen.load import Asker, Clock, Limits, Progress, Run, Sleep, run_closed_loop, run_open_loop
from tools.loadgen.slo import Slo
from tools.loadgen.stats import Summary, Window, steady_window, summarise
from tools.loadgen.stream import Record
from tools.loadgen.workload import WorkloadSpec, draw_chat

_WARMUP_USERS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """What one run puts on the server: an open loop with a rate or a trace's arrivals, or else a closed loop of users."""

    rate: Rate | None = None
    burstiness: float = 1.0
    concurrency: int = 1
    stagger_s: float = 0.0
    num_chats: int | None = None
    duration_s: float | None = None
    drain_s: float | None = None
    warmup_chats: int = 0  # before the run
    warmup_s: float = 0.0  # at the start of the run

    def label(self) -> str:
        if self.rate is not None:
            return f"{self.rate} req/s"
        return f"{self.concurrency} user{'s' if self.concurrency > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A run and what came of it."""

    label: str
    load: Load
    run: Run
    window: Window
    summary: Summary


@dataclass(frozen=True, slots=True)
class Harness:
    """What every run has in common. `begins` is told each run's label and number of chats, if known."""

    client: Asker
    spec: WorkloadSpec
    slo: Slo | None = None
    clock: Clock = time.perf_counter
    sleep: Sleep = asyncio.sleep
    begins: Callable[[str, int | None], None] = lambda label, num_chats: None
    progress: Progress = lambda record: None

    async def warm_up(self, load: Load) -> None:
        """Send `load.warmup_chats` chats that are drawn for nothing else, a few at a time."""
        if load.warmup_chats:
            spec = replace(self.spec, seed=_seed(self.spec.seed, -1), trace=())
            users = min(load.concurrency if load.rate is None else _WARMUP_USERS, load.warmup_chats)
            draw = partial(draw_chat, spec)
            await run_closed_loop(
                self.client, draw, concurrency=users, num_chats=load.warmup_chats, clock=self.clock, sleep=self.sleep
            )

    async def measure(self, load: Load, *, number: int = 0, max_bad_share: float | None = None) -> Measured:
        """Run number `number`. With `max_bad_share`, it is cut short once more of its requests than that are not good."""
        spec = replace(self.spec, seed=_seed(self.spec.seed, number))
        arrivals = self._arrivals(load)
        stop = asyncio.Event()
        limits = Limits(load.duration_s, load.drain_s, stop)
        draw = partial(draw_chat, spec)
        if arrivals is None:
            self.begins(load.label(), load.num_chats)
            run = await run_closed_loop(
                self.client,
                draw,
                concurrency=load.concurrency,
                num_chats=load.num_chats,
                limits=limits,
                clock=self.clock,
                progress=self.progress,
                stagger_s=load.stagger_s,
                sleep=self.sleep,
            )
        else:
            self.begins("trace" if spec.trace else load.label(), len(arrivals))
            progress = self.progress
            if max_bad_share is not None:
                first = sum(arrival_s < load.warmup_s for arrival_s in arrivals)
                progress = _GivesUp(self.slo or Slo(), stop, first, int(max_bad_share * (len(arrivals) - first)), progress)
            run = await run_open_loop(
                self.client, draw, arrivals, limits=limits, clock=self.clock, progress=progress, sleep=self.sleep
            )
        is_whole = load.num_chats is None or run.wall_s >= (load.duration_s or 0.0)  # not over before its time
        window = steady_window(run, warmup_s=load.warmup_s, duration_s=load.duration_s if is_whole else None)
        label = "trace" if spec.trace else load.label()
        return Measured(label, load, run, window, summarise(run, window, self.slo))

    def _arrivals(self, load: Load) -> list[float] | None:
        if self.spec.trace:
            times = [entry.at_s for entry in self.spec.trace[: load.num_chats]]
            return [at_s for at_s in times if load.duration_s is None or at_s < load.duration_s]
        if load.rate is None:
            return None
        return arrival_times(
            load.rate,
            burstiness=load.burstiness,
            seed=self.spec.seed,
            num_arrivals=load.num_chats,
            duration_s=load.duration_s,
        )


async def sweep(harness: Harness, loads: Sequence[Load]) -> AsyncIterator[Measured]:
    """The loads one after another; before the first, the warm-up."""
    await harness.warm_up(loads[0])
    for number, load in enumerate(loads):
        yield await harness.measure(load, number=number)


async def find_knee(harness: Harness, load: Load, search: KneeSearch, *, max_s: float) -> AsyncIterator[Measured]:
    """Probe as `search` says until it is content or `max_s` have passed; `load` is every probe's, but for the rate."""
    await harness.warm_up(load)
    began_s = harness.clock()
    while harness.clock() - began_s < max_s and (rate := search.next_rate()) is not None:
        probe = replace(load, rate=Rate(rate, rate))
        measured = await harness.measure(probe, number=len(search.probes), max_bad_share=1.0 - search.threshold)
        search.tell(rate, measured.summary.good_share)
        yield measured


@dataclass(slots=True)
class _GivesUp:
    """Counts requests that are not good, and stops the run when there are more than `max_bad`: nothing could save it any more."""

    slo: Slo
    stop: asyncio.Event
    first: int  # chats before this one are warm-up
    max_bad: int
    progress: Progress
    num_bad: int = 0

    def __call__(self, record: Record) -> None:
        self.progress(record)
        if record.index >= self.first and not self.slo.holds(record):
            self.num_bad += 1
            if self.num_bad > self.max_bad:
                self.stop.set()


def _seed(seed: int, number: int) -> int:
    """Another one for every run; number -1 is the warm-up."""
    return seed * 1_000_003 + number + 1
