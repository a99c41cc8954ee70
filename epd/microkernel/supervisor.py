"""Keeps a set of actors running: started in order, restarted with back-off after a crash, drained and stopped in reverse order.

Owns: which actors should run and how often each was restarted. An actor that crashes too often is given up, and whoever runs the
process is told. Does not know what the actors do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from epd.errors import InternalError
from epd.log import Log
from epd.microkernel.actor import Actor
from epd.microkernel.system import DEFAULT_MAILBOX, System
from epd.microkernel.tasks import TaskOwner

_log = Log("supervisor")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most `max_restarts` within `window_s`; the n-th of them waits first_backoff_s * 2**(n-1), at most max_backoff_s."""

    max_restarts: int = 5
    window_s: float = 60.0
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0


@dataclass(slots=True)
class _Child:
    name: str
    make: Callable[[], Actor]
    mailbox: int
    actor: Actor | None = None
    restarted_at: deque[float] = field(default_factory=deque)


class Supervisor:
    """`on_given_up(name, error)` is called when an actor has crashed too often; the others keep running."""

    def __init__(
        self, system: System, *, policy: RestartPolicy | None = None, on_given_up: Callable[[str, Exception], None] | None = None
    ) -> None:
        self._system = system
        self._policy = policy or RestartPolicy()
        self._on_given_up = on_given_up
        self._children: dict[str, _Child] = {}
        self._tasks = TaskOwner()
        self._is_started = False
        self._is_stopping = False

    def add(self, name: str, make: Callable[[], Actor], *, mailbox: int = DEFAULT_MAILBOX) -> None:
        """`make` is called for the first start and again for every restart. Before start() only."""
        if self._is_started or name in self._children:
            raise InternalError(f"actor {name!r} cannot be added: it is there, or the supervisor has started")
        self._children[name] = _Child(name, make, mailbox)

    async def start(self) -> None:
        """Start all in the order in which they were added. Raises what a start raises, with the earlier ones stopped again."""
        self._is_started = True
        try:
            for child in self._children.values():
                await self._start(child)
        except BaseException:
            await self.stop()
            raise

    def actor(self, name: str) -> Actor:
        """The running actor. Raises InternalError while it is down."""
        child = self._children.get(name)
        if child is None or child.actor is None:
            raise InternalError(f"actor {name!r} is not running")
        return child.actor

    @property
    def is_complete(self) -> bool:
        """Every actor is running."""
        return all(child.actor is not None for child in self._children.values())

    def num_restarts(self, name: str) -> int:
        """Within the policy's window."""
        return len(self._children[name].restarted_at)

    async def drain(self, *, timeout_s: float) -> bool:
        """Have every actor, last started first, finish what it has. False: time ran out first."""
        try:
            async with asyncio.timeout(timeout_s):
                for child in reversed(self._children.values()):
                    if child.actor is not None:
                        await child.actor.drained()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop all, last started first. Safe to call twice."""
        self._is_stopping = True
        await self._tasks.close()
        for child in reversed(self._children.values()):
            child.actor = None
            await self._system.unregister(child.name)

    # --- restarts ---------------------------------------------------------------------------------------------------

    async def _start(self, child: _Child) -> None:
        actor = child.make()
        await self._system.register(child.name, actor, mailbox=child.mailbox, on_crash=lambda error: self._crashed(child, error))
        child.actor = actor

    def _crashed(self, child: _Child, error: Exception) -> None:
        child.actor = None
        if not self._is_stopping:
            self._tasks.spawn(self._restart(child, error), name=f"restart {child.name}")

    async def _restart(self, child: _Child, error: Exception) -> None:
        loop = asyncio.get_running_loop()
        while True:
            policy, times = self._policy, child.restarted_at
            while times and loop.time() - times[0] > policy.window_s:
                times.popleft()
            if len(times) >= policy.max_restarts:
                _log.error("an actor crashes too often and is given up", error=error, actor=child.name, restarts=len(times))
                if self._on_given_up is not None:
                    self._on_given_up(child.name, error)
                return
            backoff_s = min(policy.first_backoff_s * 2 ** len(times), policy.max_backoff_s)
            times.append(loop.time())
            await asyncio.sleep(backoff_s)
            try:
                await self._start(child)
            except Exception as failure:
                error = failure
            else:
                _log.warning("an actor was restarted", actor=child.name, restarts=len(times), reason=str(error))
                return
