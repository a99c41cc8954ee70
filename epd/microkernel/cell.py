"""One running actor: its mailbox, the task that reads it, the tasks it spawned, and the answers that it owes.

Knows: when the actor lives and that nothing of it outlives it. Does not know: addresses of others, links.
"""

from __future__ import annotations

import asyncio
from asyncio import _enter_task, _leave_task  # documented under "Extending asyncio"
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from epd.errors import EpdError, InternalError, Overloaded, Unavailable
from epd.log import Log
from epd.microkernel.actor import Actor, Mail, Reply
from epd.microkernel.headstart import HeadStart
from protocol.messages import Address

if TYPE_CHECKING:
    from epd.microkernel.system import System

STOP_TIMEOUT_S = 10.0
_log = Log("actor")


class Cell:
    """`on_crash` is called once, after the actor has been stopped because of an exception that was not an EpdError."""

    def __init__(
        self, system: System, address: Address, actor: Actor, *, capacity: int, on_crash: Callable[[Exception], None]
    ) -> None:
        self.address = address
        self.actor = actor
        self.unanswered: set[Reply] = set()
        self._capacity = capacity
        self._on_crash = on_crash
        self._mailbox: deque[Mail] = deque()
        self._reader_waiter: asyncio.Future[None] | None = None
        self._room_waiters: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._head_start: HeadStart | None = None
        self._loop = asyncio.get_running_loop()
        self._crash: Exception | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.is_open = False
        actor.system = system
        actor.address = address
        actor._cell = self

    async def start(self) -> None:
        """Raises whatever started() raises; nothing is left of the actor then."""
        self.is_open = True
        try:
            await self.actor.started()
        except BaseException:
            await self.stop()
            raise
        self._reader = self._loop.create_task(self._read(), name=f"actor {self.address.actor}")

    # --- mail -------------------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        return len(self._mailbox) < self._capacity

    @property
    def num_mails(self) -> int:
        return len(self._mailbox)

    def put(self, mail: Mail) -> None:
        """Add a mail. The caller has seen to room, or the other end of a link did by its credit."""
        if not self.is_open:
            mail.reply.fail(self.gone())
            return
        if mail.reply.kind != "tell":
            mail.reply.owed_by(self.unanswered)
        self._mailbox.append(mail)
        self._wake_reader()

    def put_now(self, mail: Mail) -> None:
        """Like put(), from a callback of the loop: an actor that waits for mail gets it at once, not a turn of the loop later.

        It runs as its reader until it first has to wait; the rest is the reader's own. That turn is a good part of what a
        small ask over a link costs.
        """
        waiter, reader = self._reader_waiter, self._reader
        if self._mailbox or waiter is None or waiter.done() or reader is None or not self.is_open:
            self.put(mail)
            return
        if mail.reply.kind != "tell":
            mail.reply.owed_by(self.unanswered)
        receiving = self._receive(mail)
        _enter_task(self._loop, reader)
        try:
            first = receiving.send(None)
        except StopIteration:
            return
        finally:
            _leave_task(self._loop, reader)
        self._head_start = HeadStart(receiving, first)
        self._wake_reader()

    def _wake_reader(self) -> None:
        waiter = self._reader_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait_for_room(self, timeout_s: float) -> None:
        """Raises Overloaded after `timeout_s`, Unavailable if the actor stops meanwhile."""
        waiter = self._loop.create_future()
        self._room_waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException as error:
            if waiter in self._room_waiters:
                self._room_waiters.remove(waiter)
            else:
                self._offer_room()  # it was offered and is not used: the next one's
            if isinstance(error, TimeoutError):
                raise Overloaded(f"the mailbox of {self.address.actor!r} stayed full for {timeout_s:g} s") from None
            raise
        if not self.is_open:
            raise self.gone()

    # --- tasks ------------------------------------------------------------------------------------------------------

    def spawn(self, coro: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        if not self.is_open:
            coro.close()
            raise InternalError(f"actor {self.address.actor!r} has stopped and spawns nothing")
        task = self._loop.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of an actor crashed", error=error, actor=self.address.actor, task=task.get_name())
            self._crashed(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _read(self) -> None:
        mailbox = self._mailbox
        while self._crash is None:
            if mailbox:
                mail = mailbox.popleft()
                if self._room_waiters:
                    self._offer_room()
                await self._receive(mail)
            else:
                self._reader_waiter = self._loop.create_future()
                try:
                    await self._reader_waiter
                except asyncio.CancelledError:
                    if (begun := self._take_head_start()) is not None:
                        await begun.cancelled()
                    raise
                if (begun := self._take_head_start()) is not None:
                    await begun

    def _take_head_start(self) -> HeadStart | None:
        begun, self._head_start = self._head_start, None
        return begun

    async def _receive(self, mail: Mail) -> None:
        """Let the actor have one mail, whatever comes of it."""
        reply = mail.reply
        if reply.kind == "tell":
            reply.taken()
        elif reply.cancelled:
            return  # nobody waits for it any more
        try:
            await self.actor.receive(mail)
        except EpdError as error:
            if reply.kind == "tell" or not reply.answered:
                reply.fail(error)
            else:
                _log.warning("an actor failed after its answer", actor=self.address.actor, reason=error.message)
        except Exception as error:
            if reply.kind != "tell" and not reply.answered:
                reply.fail(InternalError(f"actor {self.address.actor!r} crashed: {type(error).__name__}: {error}"))
            _log.error("an actor crashed", error=error, actor=self.address.actor, mail=type(mail.message).__name__)
            self._crashed(error)

    def _offer_room(self) -> None:
        while self._room_waiters:
            waiter = self._room_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    # --- end --------------------------------------------------------------------------------------------------------

    def _crashed(self, error: Exception) -> None:
        if self._crash is None and self.is_open:
            self._crash = error
            self._begin_stop()

    async def stop(self) -> None:
        """Stop reading, end all tasks, call stopped(), answer what is still owed. Safe to call twice."""
        await asyncio.shield(self._begin_stop())

    def _begin_stop(self) -> asyncio.Task[None]:
        self.is_open = False
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._stop(), name=f"stop {self.address.actor}")
        return self._stopping

    async def _stop(self) -> None:
        tasks = {task for task in (*self._tasks, self._reader) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
            for task in late:
                _log.error("a task does not end when cancelled", actor=self.address.actor, task=task.get_name())
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.actor.stopped()
        except Exception as error:
            _log.error("stopped() failed", error=error, actor=self.address.actor)
        for mail in self._mailbox:
            if mail.reply.kind == "tell":
                mail.reply.taken()
        self._mailbox.clear()
        for reply in list(self.unanswered):
            reply.fail(self.gone())
        while self._room_waiters:
            self._offer_room()
        if self._crash is not None:
            self._on_crash(self._crash)

    def gone(self) -> Unavailable:
        return Unavailable(f"actor {self.address.actor!r} of worker {self.address.worker!r} has stopped")
