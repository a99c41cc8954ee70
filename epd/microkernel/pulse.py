"""How late this process's event loop is: what everything else in it waits for, and nobody else sees."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from epd.clock import Clock, monotonic
from epd.errors import InternalError
from epd.microkernel.actor import Actor, Mail

PERIOD_S = 0.1
_KEPT = 300  # beats: half a minute


class Pulse(Actor):
    """One per process."""

    def __init__(self, clock: Clock = monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        super().__init__()
        self._clock = clock
        self._sleep = sleep
        self._lags: deque[float] = deque(maxlen=_KEPT)

    async def started(self) -> None:
        self.spawn(self._beat(), name="pulse")

    async def receive(self, mail: Mail) -> None:
        raise InternalError(f"the pulse was sent {type(mail.message).__name__}")

    def lag_s(self) -> float:
        """By how much the loop came too late to a timer, 99th percentile of the last half minute; -1 before the first."""
        if not self._lags:
            return -1.0
        return sorted(self._lags)[int(0.99 * (len(self._lags) - 1))]

    async def _beat(self) -> None:
        while True:
            before = self._clock()
            await self._sleep(PERIOD_S)
            self._lags.append(max(0.0, self._clock() - before - PERIOD_S))
