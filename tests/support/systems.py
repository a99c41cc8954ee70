"""Systems that talk over loopback sockets, and actors to talk to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from epd.errors import InternalError
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from protocol.messages import Address, Message, WorkerId

TOKEN = "a cluster token"
WAIT_S = 20.0
"""Bound of every wait in a test; far more than it takes."""


@asynccontextmanager
async def running(
    *workers: str, unix: bool = True, heartbeat_s: float = 0.5, introduced: bool = True, token: str = TOKEN
) -> AsyncIterator[list[System]]:
    """One started system per name, each knowing the others. At the end all must be idle and nothing may be left."""
    before = asyncio.all_tasks()
    systems = [System(worker=WorkerId(worker), token=token, unix=unix, heartbeat_s=heartbeat_s) for worker in workers]
    try:
        for system in systems:
            await system.start()
        if introduced:
            for system in systems:
                for other in systems:
                    system.introduce(other.endpoint)
        yield systems
        await idle(*systems)
    finally:
        for system in systems:
            await system.stop()
    for system in systems:
        system.check_integrity()
    left = asyncio.all_tasks() - before
    assert not left, f"tasks left behind: {left}"


def media(system: System) -> dict[WorkerId, str]:
    """The workers that it has a link to, and whether that is "unix" or "tcp"."""
    return {worker: link.medium for worker, link in system._open_links.items()}


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # whatever is waited for has no event of its own
            await asyncio.sleep(0.001)


async def idle(*systems: System) -> None:
    """Let the loop run until no system has anything unfinished; fails with what is unfinished."""

    def all_idle() -> bool:
        try:
            for system in systems:
                system.check_integrity()
        except InternalError:
            return False
        return True

    try:
        await until(all_idle)
    except TimeoutError:
        for system in systems:
            system.check_integrity()
        raise


class Recorder(Actor):
    """Keeps every mail and answers nothing by itself."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []
        self.is_stopped = False
        self._arrived = asyncio.Event()

    async def receive(self, mail: Mail) -> None:
        self.mails.append(mail)
        self._arrived.set()

    async def stopped(self) -> None:
        self.is_stopped = True

    async def mail(self, index: int = 0) -> Mail:
        """The mail number `index`, once it is there."""
        async with asyncio.timeout(WAIT_S):
            while len(self.mails) <= index:
                self._arrived.clear()
                await self._arrived.wait()
        return self.mails[index]


class Echo(Actor):
    """Answers an ask with what it was sent."""

    async def receive(self, mail: Mail) -> None:
        mail.reply.send(mail.message, mail.buffers)


class Gate(Actor):
    """Reads one mail and no other until it is opened: its mailbox fills."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.messages: list[Message] = []

    async def receive(self, mail: Mail) -> None:
        await self.opened.wait()
        self.messages.append(mail.message)
        if mail.reply.kind == "ask":
            mail.reply.send(mail.message)


def at(system: System, actor: str) -> Address:
    return Address(system.worker, actor)
