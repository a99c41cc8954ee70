"""Futures that share timers: expired late by a tick at most, never early, never after they were discarded."""

from __future__ import annotations

import asyncio

import pytest

from epd.microkernel.deadlines import TICK_S, Deadlines
from tests.support.systems import WAIT_S


async def test_a_future_expires_after_its_time_and_not_before() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    future: asyncio.Future[None] = loop.create_future()
    began = loop.time()
    deadlines.add(future, 0.03)
    with pytest.raises(TimeoutError):
        await future
    assert loop.time() - began >= 0.03
    assert deadlines.num_futures == 0


async def test_futures_of_one_tick_share_a_timer() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(100)]
    sets = {id(deadlines.add(future, WAIT_S)) for future in futures}
    assert len(sets) <= 1 + int(1 / TICK_S)
    assert deadlines.num_futures == 100


async def test_a_discarded_or_finished_future_is_left_alone() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    discarded, finished, last = loop.create_future(), loop.create_future(), loop.create_future()
    deadlines.add(discarded, 0.001).discard(discarded)
    deadlines.add(finished, 0.001)
    finished.set_result(1)
    deadlines.add(last, 0.05)
    with pytest.raises(TimeoutError):
        await last
    assert not discarded.done()
    assert finished.result() == 1


async def test_a_deadline_that_has_passed_expires_soon() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    Deadlines(loop).add(future, -1.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            await future
    assert isinstance(future.exception(), TimeoutError)
