"""Order of start, restarts after crashes, draining, giving up."""

from __future__ import annotations

import asyncio

import pytest

from epd.errors import EpdError, InternalError, Unavailable
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.supervisor import RestartPolicy, Supervisor
from protocol.messages import ReleaseLease
from tests.support.systems import WAIT_S, at, running, until

AT_ONCE = RestartPolicy(max_restarts=3, first_backoff_s=0.001, max_backoff_s=0.002)


class Child(Actor):
    """Writes what happens to it into a diary that all share. Lease id 0 makes it crash."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name = name
        self.diary = diary

    async def started(self) -> None:
        self.diary.append(f"{self.name} started")

    async def stopped(self) -> None:
        self.diary.append(f"{self.name} stopped")

    async def drained(self) -> None:
        self.diary.append(f"{self.name} drained")

    async def receive(self, mail: Mail) -> None:
        if mail.message == ReleaseLease(0):
            raise ZeroDivisionError("a bug")
        mail.reply.send(mail.message)


async def test_start_in_order_drain_and_stop_in_reverse() -> None:
    async with running("a") as (system,):
        diary: list[str] = []
        supervisor = Supervisor(system)
        for name in ("x", "y"):
            supervisor.add(name, lambda name=name: Child(name, diary))  # type: ignore[misc]
        with pytest.raises(InternalError):
            supervisor.add("x", lambda: Child("x", diary))
        await supervisor.start()
        assert supervisor.is_complete
        assert isinstance(supervisor.actor("x"), Child)
        assert await supervisor.drain(timeout_s=WAIT_S)
        await supervisor.stop()
        assert diary == ["x started", "y started", "y drained", "x drained", "y stopped", "x stopped"]
        with pytest.raises(InternalError):
            supervisor.add("z", lambda: Child("z", diary))


async def test_a_crashed_actor_is_made_again() -> None:
    async with running("a") as (system,):
        diary: list[str] = []
        supervisor = Supervisor(system, policy=AT_ONCE)
        supervisor.add("x", lambda: Child("x", diary))
        supervisor.add("y", lambda: Child("y", diary))
        await supervisor.start()
        first = supervisor.actor("x")
        with pytest.raises(EpdError, match="ZeroDivisionError"):
            await system.ask(at(system, "x"), ReleaseLease(0), timeout_s=WAIT_S)
        await until(lambda: supervisor.is_complete and supervisor.actor("x") is not first)
        assert (await system.ask(at(system, "x"), ReleaseLease(1), timeout_s=WAIT_S)).message == ReleaseLease(1)
        assert diary == ["x started", "y started", "x stopped", "x started"]
        assert supervisor.num_restarts("x") == 1
        await supervisor.stop()


async def test_an_actor_that_crashes_too_often_is_given_up_and_the_others_go_on() -> None:
    async with running("a") as (system,):
        given_up: list[str] = []
        supervisor = Supervisor(system, policy=AT_ONCE, on_given_up=lambda name, error: given_up.append(f"{name}: {error}"))
        supervisor.add("x", lambda: Child("x", []))
        supervisor.add("y", lambda: Child("y", []))
        await supervisor.start()
        async with asyncio.timeout(WAIT_S):
            while not given_up:
                try:
                    await system.ask(at(system, "x"), ReleaseLease(0), timeout_s=WAIT_S)
                except Unavailable:
                    await asyncio.sleep(0.001)  # it is being restarted
                except EpdError:
                    pass
        assert given_up == ["x: a bug"]
        assert supervisor.num_restarts("x") == 3
        assert not supervisor.is_complete
        with pytest.raises(InternalError, match="not running"):
            supervisor.actor("x")
        await system.ask(at(system, "y"), ReleaseLease(1), timeout_s=WAIT_S)
        await supervisor.stop()


async def test_an_actor_that_cannot_be_made_again_counts_as_crashing() -> None:
    async with running("a") as (system,):
        given_up = asyncio.Event()
        attempts = 0

        def make() -> Child:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                raise ValueError("cannot be made")
            return Child("x", [])

        supervisor = Supervisor(system, policy=AT_ONCE, on_given_up=lambda name, error: given_up.set())
        supervisor.add("x", make)
        await supervisor.start()
        with pytest.raises(EpdError):
            await system.ask(at(system, "x"), ReleaseLease(0), timeout_s=WAIT_S)
        async with asyncio.timeout(WAIT_S):
            await given_up.wait()
        assert attempts == 1 + AT_ONCE.max_restarts
        await supervisor.stop()


async def test_a_start_that_fails_stops_what_was_started() -> None:
    class Stillborn(Child):
        async def started(self) -> None:
            raise ZeroDivisionError

    async with running("a") as (system,):
        diary: list[str] = []
        supervisor = Supervisor(system)
        supervisor.add("x", lambda: Child("x", diary))
        supervisor.add("y", lambda: Stillborn("y", diary))
        with pytest.raises(ZeroDivisionError):
            await supervisor.start()
        assert diary == ["x started", "y stopped", "x stopped"]


async def test_a_drain_that_takes_too_long_says_so() -> None:
    class Busy(Child):
        async def drained(self) -> None:
            await asyncio.Event().wait()

    async with running("a") as (system,):
        supervisor = Supervisor(system)
        supervisor.add("x", lambda: Busy("x", []))
        await supervisor.start()
        assert not await supervisor.drain(timeout_s=0.01)
        await supervisor.stop()


async def test_stopping_ends_a_pending_restart() -> None:
    async with running("a") as (system,):
        diary: list[str] = []
        supervisor = Supervisor(system, policy=RestartPolicy(first_backoff_s=1000.0, max_backoff_s=1000.0))
        supervisor.add("x", lambda: Child("x", diary))
        await supervisor.start()
        with pytest.raises(EpdError):
            await system.ask(at(system, "x"), ReleaseLease(0), timeout_s=WAIT_S)
        await until(lambda: supervisor.num_restarts("x") == 1)
        async with asyncio.timeout(WAIT_S):
            await supervisor.stop()
        assert diary == ["x started", "x stopped"]
