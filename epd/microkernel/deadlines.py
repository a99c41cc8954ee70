"""Time-outs of very many futures with very few timers.

Almost no ask reaches its deadline, and a timer each would cost more than the rest of a local ask. So futures that are due within
the same tick share one timer; a future is expired up to TICK_S late, never early.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeAlias

TICK_S: Final = 0.02
Due: TypeAlias = set[asyncio.Future[Any]]


class Deadlines:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ticks: dict[int, Due] = {}

    def add(self, future: asyncio.Future[Any], timeout_s: float) -> Due:
        """Give the future a TimeoutError `timeout_s` from now, unless it is discarded from the returned set before."""
        tick = int((self._loop.time() + timeout_s) / TICK_S) + 1
        due = self._ticks.get(tick)
        if due is None:
            due = self._ticks[tick] = set()
            self._loop.call_at(tick * TICK_S, self._expire, tick)
        due.add(future)
        return due

    @property
    def num_futures(self) -> int:
        return sum(len(due) for due in self._ticks.values())

    def _expire(self, tick: int) -> None:
        for future in self._ticks.pop(tick):
            if not future.done():
                future.set_exception(TimeoutError())
