"""The way back within one process: answers and items are handed over by reference.

The counterpart of link.py for actors that share a process. Knows nothing of mailboxes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from epd.errors import CorruptTransfer, InternalError, from_wire
from epd.microkernel.actor import Answer, Buffer, Reply
from epd.microkernel.itemstream import ItemStream
from protocol.messages import Failed, Message


class _Nowhere:
    """The way back of a tell: there is none."""

    __slots__ = ()

    def answer(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        raise InternalError("this is not an ask: it has no answer")

    def item(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        raise InternalError("this is not a stream: it has no items")

    def end(self, ask_id: int, failed: Failed | None) -> None:
        raise InternalError("this is not a stream: it has no end")

    def item_room(self, ask_id: int) -> int:
        return 0

    def taken(self, ask_id: int) -> None:
        """Nobody counts: the mailbox itself has the bound."""


class LocalAsk(_Nowhere):
    """Back to an ask of this process."""

    __slots__ = ("_future",)

    def __init__(self, future: asyncio.Future[Answer]) -> None:
        self._future = future

    def answer(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        if not self._future.done():
            self._future.set_result(Answer(message, by_reference(buffers)))


class LocalStream(_Nowhere):
    """Both ends of a stream within this process."""

    __slots__ = ("_items", "_window", "reply")

    def __init__(self, items: ItemStream, window: int) -> None:
        self._items = items
        self._window = window
        self.reply = Reply("stream", self)

    def item(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        self._items.push(Answer(message, by_reference(buffers)))

    def end(self, ask_id: int, failed: Failed | None) -> None:
        self._items.finish(None if failed is None else from_wire(failed))

    def item_room(self, ask_id: int) -> int:
        return self._window - self._items.num_items

    def took_item(self) -> None:
        self.reply.room_opened()

    def left(self) -> None:
        self.reply.cancel()


TOLD: Final = Reply("tell", _Nowhere(), 0, True)
"""The reply of every tell within a process."""


def by_reference(buffers: Sequence[Buffer]) -> tuple[memoryview | bytes, ...]:
    """Buffers as a mail has them, uncopied."""
    if not buffers:
        return ()
    return tuple(buffer if isinstance(buffer, bytes | memoryview) else memoryview(buffer) for buffer in buffers)


def copy_into(answer: Answer, into: Sequence[memoryview]) -> Answer:
    """What receiving into memory comes to when nothing travels. Raises CorruptTransfer, having copied nothing."""
    views = [view.cast("B") for view in into]
    sources = [memoryview(buffer).cast("B") for buffer in answer.buffers]
    sizes = [source.nbytes for source in sources]
    if sizes != [view.nbytes for view in views]:
        raise mismatch(sizes, views)
    for view, source in zip(views, sources, strict=True):
        view[:] = source
    return Answer(answer.message, tuple(views))


def mismatch(sizes: Sequence[int], views: Sequence[memoryview]) -> CorruptTransfer:
    made_for = [view.nbytes for view in views]
    return CorruptTransfer(f"the answer has buffers of {list(sizes)} bytes, memory was given for {made_for}")
