"""An event loop that is held up is told to be late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from epd.microkernel.pulse import Pulse


async def _lag_s(late_s: Sequence[float]) -> float:
    """What a pulse says whose sleeps took so much longer than they should have."""
    now = 100.0
    left = list(late_s)
    slept = asyncio.Event()

    async def sleep(seconds: float) -> None:
        nonlocal now
        if not left:
            slept.set()
            await asyncio.Event().wait()
        now += seconds + left.pop(0)

    pulse = Pulse(lambda: now, sleep)
    beating = asyncio.create_task(pulse._beat())
    await asyncio.wait_for(slept.wait(), 20)
    beating.cancel()
    return pulse.lag_s()


async def test_what_holds_the_loop_up_is_seen() -> None:
    assert await _lag_s([0.001] * 50 + [0.25] * 5) == pytest.approx(0.25)


async def test_one_hiccup_in_two_hundred_is_forgiven() -> None:
    assert await _lag_s([0.001] * 100 + [0.25] + [0.001] * 100) == pytest.approx(0.001)


async def test_before_the_first_beat_nobody_knows() -> None:
    assert await _lag_s([]) == -1.0
