"""What an actor is, what it is sent, and how it answers.

Owns: the promise that every ask and stream is answered exactly once. Knows nothing of links or systems: a `Way` carries an
answer back to wherever it was asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from epd.errors import Cancelled, EpdError, InternalError
from epd.log import Log
from protocol.messages import Address, Failed, Message, WorkerId

if TYPE_CHECKING:
    from epd.microkernel.cell import Cell
    from epd.microkernel.system import System

Buffer: TypeAlias = bytes | bytearray | memoryview
Kind: TypeAlias = Literal["tell", "ask", "stream"]
_log = Log("actor")


class Answer(NamedTuple):
    """What an ask brings, or one item of a stream."""

    message: Message
    buffers: tuple[memoryview | bytes, ...] = ()


class Mail(msgspec.Struct):
    """One message in a mailbox."""

    message: Message
    buffers: tuple[memoryview | bytes, ...]
    reply: Reply
    sender: WorkerId


class Actor:
    """Subclass it. One mailbox; `receive` calls never overlap; long work goes to `spawn`.

    `system` and `address` are there from `started` on.
    """

    system: System
    address: Address
    _cell: Cell

    async def started(self) -> None:
        """Called before the first mail."""

    async def stopped(self) -> None:
        """Called after the last mail and after all spawned tasks have ended; also after a crash."""

    async def receive(self, mail: Mail) -> None:
        """An EpdError raised here answers the mail with Failed; another exception is a crash and stops the actor."""
        raise NotImplementedError

    def spawn(self, coro: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """A task that ends with the actor. An exception in it is a crash of the actor."""
        return self._cell.spawn(coro, name=name)


class Way(Protocol):
    """How answers get back to whoever asked, under the id that was given with it. Raises EpdError, having sent nothing, if it
    cannot carry a message."""

    def answer(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None: ...

    def item(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None: ...

    def end(self, ask_id: int, failed: Failed | None) -> None: ...

    def item_room(self, ask_id: int) -> int:
        """Items that may be sent now."""

    def taken(self, ask_id: int) -> None:
        """A tell has left the mailbox. Links give credit for it."""


class Reply(msgspec.Struct, eq=False):
    """The other end of a mail. An ask is answered by one `send` or `fail`; a stream by items and one `end` or `fail`.

    Buffers belong to the receiver of the answer from then on, and must not change before it lets go of them. Answering twice
    raises InternalError; answering somebody who has left does nothing.
    """

    # A struct because one is made for every ask, and because nothing is cheaper to make.
    kind: Kind
    _way: Way
    _id: int = 0
    _done: bool = False
    _cancelled: bool = False
    _callbacks: list[Callable[[], None]] | None = None
    _room_waiters: deque[asyncio.Future[None]] | None = None
    _unanswered: set[Reply] | None = None

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """The one answer to an ask."""
        if self._may_answer("ask"):
            self._way.answer(self._id, message, buffers)
            self._settle()

    async def item(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """One item of a stream, as soon as its consumer has room.

        Raises:
            Cancelled: the consumer has left.
        """
        if not self._may_answer("stream"):
            raise Cancelled("the consumer of this stream has left")
        while self._way.item_room(self._id) <= 0 or self._room_waiters:
            waiter = asyncio.get_running_loop().create_future()
            if self._room_waiters is None:
                self._room_waiters = deque()
            self._room_waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._room_waiters:
                    self._room_waiters.remove(waiter)
            if not self._may_answer("stream"):
                raise Cancelled("the consumer of this stream has left")
            if self._way.item_room(self._id) > 0:
                break
        self._way.item(self._id, message, buffers)
        self.room_opened()

    def end(self) -> None:
        """The stream is complete."""
        if self._may_answer("stream"):
            self._way.end(self._id, None)
            self._settle()

    def fail(self, error: EpdError) -> None:
        """The one answer to an ask, or the end of a stream, if it went wrong. A tell's failure is only logged."""
        if self.kind == "tell":
            _log.warning("a tell failed", code=error.code, reason=error.message)
        elif self._may_answer(self.kind):
            if self.kind == "ask":
                self._way.answer(self._id, error.to_wire(), ())
            else:
                self._way.end(self._id, error.to_wire())
            self._settle()

    @property
    def cancelled(self) -> bool:
        """Whoever asked has cancelled, timed out or died."""
        return self._cancelled

    @property
    def answered(self) -> bool:
        """Nothing is owed any more (also: nobody waits for it any more)."""
        return self._done

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when whoever asked leaves before the answer; at once if that has happened."""
        if self._cancelled:
            callback()
        elif not self._done:
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)

    # --- for the microkernel ----------------------------------------------------------------------------------------

    def owed_by(self, unanswered: set[Reply]) -> None:
        """Stay in `unanswered` until settled."""
        if not self._done:
            unanswered.add(self)
            self._unanswered = unanswered

    def taken(self) -> None:
        """A tell has left the mailbox."""
        self._way.taken(self._id)

    def cancel(self) -> None:
        """Whoever asked has left."""
        if self._done:
            return
        self._cancelled = True
        callbacks = self._callbacks
        self._settle()
        for callback in callbacks or ():
            try:
                callback()
            except Exception as error:
                _log.error("a cancel callback failed", error=error)

    def room_opened(self) -> None:
        """Let the next waiting item look again."""
        for waiter in self._room_waiters or ():
            if not waiter.done():
                waiter.set_result(None)
                return

    def _settle(self) -> None:
        self._done = True
        self._callbacks = None
        if self._unanswered is not None:
            self._unanswered.discard(self)
            self._unanswered = None
        for waiter in self._room_waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def _may_answer(self, kind: Kind) -> bool:
        if self.kind != kind:
            raise InternalError(f"a mail of kind {self.kind!r} was answered like a mail of kind {kind!r}")
        if self._cancelled:
            return False
        if self._done:
            raise InternalError("a mail was answered twice")
        return True
