"""Users who come one after another, until all of a workload's are there, and stay for a while.

Owns nothing of the cluster. A user asks again when answered. The ramp shows at how many users the promise breaks; what all of
them are given together is measured in the stretch after it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

from tools.loadgen.client import Client
from tools.loadgen.stream import Record
from tools.loadgen.workload import Chat

_LAG_PROBE_S = 0.05
_FIRST_SHARE = 1 / 8  # of the users: they are there from the start


@dataclass(slots=True)
class Drive:
    """Times on the clock of the records."""

    joined_s: list[float] = field(default_factory=list)  # of each user, rising
    records: list[Record] = field(default_factory=list)  # whose request ended, or was cut off
    held_s: tuple[float, float] = (0.0, 0.0)  # the stretch with all users
    lags_s: list[float] = field(default_factory=list)  # of this program's own event loop
    cpu_s: float = 0.0  # of this program


async def drive(
    client: Client,
    draw: Callable[[int], Chat],
    *,
    users: int,
    ramp_s: float,
    hold_s: float,
    at_edges: Callable[[], Awaitable[None]],
) -> Drive:
    """`at_edges` is awaited when all users are there, and at the end."""
    found = Drive()
    numbers = count()
    cpu_before = time.process_time()
    start = time.perf_counter()
    client.reopen()
    is_over = False

    async def user(joins_s: float) -> None:
        await asyncio.sleep(joins_s)
        found.joined_s.append(time.perf_counter())
        while not is_over:
            found.records.append(await client.ask(draw(next(numbers)).request()))

    async def probe() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LAG_PROBE_S)
            found.lags_s.append(max(0.0, time.perf_counter() - before - _LAG_PROBE_S))

    prober = asyncio.create_task(probe())
    tasks = [asyncio.create_task(user(joins_s)) for joins_s in joining_times(users, ramp_s)]
    try:
        await asyncio.sleep(max(0.0, start + ramp_s - time.perf_counter()))
        await at_edges()
        held_from = time.perf_counter()
        await asyncio.sleep(hold_s)
        await at_edges()
        found.held_s = (held_from, time.perf_counter())
    finally:
        is_over = True
        client.cut_off()
        prober.cancel()
        for task in tasks:
            if time.perf_counter() < start + ramp_s:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    found.cpu_s = time.process_time() - cpu_before
    return found


def joining_times(users: int, ramp_s: float) -> list[float]:
    """By so many percent more users in equal times; the first few at once."""
    first = max(1, round(users * _FIRST_SHARE))
    if users <= first:
        return [0.0] * users
    return [0.0] * first + [ramp_s * math.log(n / first) / math.log(users / first) for n in range(first + 1, users + 1)]
