"""A coroutine that began outside its task ends in it as if it had begun there."""

from __future__ import annotations

import asyncio
from asyncio import _enter_task, _leave_task
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from epd.errors import Unavailable
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.headstart import HeadStart
from protocol.messages import ReleaseLease
from tests.support.systems import WAIT_S, at, running, until


async def run(make: Callable[[], Coroutine[Any, Any, None]], *, cancel: bool = False) -> None:
    """Start the coroutine in the name of a task, and finish it there."""
    loop = asyncio.get_running_loop()
    begun: list[HeadStart] = []
    gate = asyncio.Event()

    async def owner() -> None:
        await gate.wait()
        await (begun[0].cancelled() if cancel else begun[0])

    task = loop.create_task(owner())

    def start() -> None:
        coro = make()
        _enter_task(loop, task)
        try:
            begun.append(HeadStart(coro, coro.send(None)))
        finally:
            _leave_task(loop, task)
        gate.set()

    loop.call_soon(start)
    await task


@pytest.mark.parametrize("wait", [lambda: asyncio.sleep(0), lambda: asyncio.sleep(0.001), lambda: asyncio.sleep(0, "x")])
async def test_it_waits_and_goes_on(wait: Callable[[], Coroutine[Any, Any, object]]) -> None:
    seen: list[object] = []

    async def work() -> None:
        seen.append(asyncio.current_task())
        seen.append(await wait())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    await run(work)
    assert len(seen) == 3
    assert seen[0] is seen[2]


async def test_a_time_out_that_it_began_reaches_it() -> None:
    async def work() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await run(work)


async def test_an_error_comes_out() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run(work)


async def test_cancelling_lets_it_clean_up() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    with pytest.raises(asyncio.CancelledError):
        await run(work, cancel=True)
    assert seen == ["cleaned up"]


class Waiting(Actor):
    """Waits within receive(), with a time-out of its own, one mail at a time."""

    def __init__(self) -> None:
        self.num_receiving = 0
        self.order: list[int] = []
        self.was_cancelled = False

    async def receive(self, mail: Mail) -> None:
        assert isinstance(mail.message, ReleaseLease)
        self.num_receiving += 1
        assert self.num_receiving == 1, "receive() calls overlap"
        self.order.append(mail.message.lease_id)
        try:
            async with asyncio.timeout(WAIT_S if mail.message.lease_id else None):
                await (asyncio.sleep(0.001) if mail.message.lease_id else asyncio.Event().wait())
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        finally:
            self.num_receiving -= 1
        mail.reply.send(mail.message)


async def test_remote_mail_is_received_one_at_a_time_and_in_order() -> None:
    async with running("a", "b") as (asker, host):
        actor = Waiting()
        to = await host.register("waiting", actor)
        for _ in range(3):
            answers = await asyncio.gather(*(asker.ask(to, ReleaseLease(i), timeout_s=WAIT_S) for i in range(1, 6)))
            assert [answer.message for answer in answers] == [ReleaseLease(i) for i in range(1, 6)]
        assert actor.order == [1, 2, 3, 4, 5] * 3


async def test_stopping_ends_a_receive_that_began_early() -> None:
    async with running("a", "b") as (asker, host):
        actor = Waiting()
        to = await host.register("waiting", actor)
        ask = asyncio.ensure_future(asker.ask(to, ReleaseLease(0), timeout_s=WAIT_S))
        await until(lambda: actor.order == [0])
        await host.unregister("waiting")
        with pytest.raises(Unavailable):
            await ask
        assert actor.was_cancelled
        assert host._cells.get(at(host, "waiting").actor) is None
