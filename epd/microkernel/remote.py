"""The far ends of a link as this side's objects see them: how answers go back to whoever asked, and who produces a stream.

Each says to the connection what happened, and has the link send it. None waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from epd.errors import BodyTooLarge
from epd.microkernel.actor import Buffer, Reply
from epd.microkernel.itemstream import ItemStream
from protocol.connection import Connection
from protocol.frames import MessageTooLarge
from protocol.messages import Failed, Message


class RemoteWay:
    """Back over the link to whoever asked."""

    __slots__ = ("_connection", "_replies", "_send_soon")

    def __init__(self, connection: Connection, replies: dict[int, Reply], send_soon: Callable[[], None]) -> None:
        """`replies`: the link's, by ask, which end here."""
        self._connection = connection
        self._replies = replies
        self._send_soon = send_soon

    def answer(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        try:
            self._connection.send_answer(ask_id, message, buffers)
        except MessageTooLarge as error:
            raise BodyTooLarge(str(error)) from None
        self._replies.pop(ask_id, None)
        self._send_soon()

    def item(self, ask_id: int, message: Message, buffers: Sequence[Buffer]) -> None:
        try:
            self._connection.send_item(ask_id, message, buffers)
        except MessageTooLarge as error:
            raise BodyTooLarge(str(error)) from None
        self._send_soon()

    def end(self, ask_id: int, failed: Failed | None) -> None:
        self._connection.send_end(ask_id, failed)
        self._replies.pop(ask_id, None)
        self._send_soon()

    def item_room(self, ask_id: int) -> int:
        return self._connection.item_room(ask_id)

    def taken(self, ask_id: int) -> None:
        """Asks and streams need no credit."""


class TellWay(RemoteWay):
    """Of all tells of a link to one actor: nothing is owed but credit."""

    __slots__ = ("_actor",)

    def __init__(self, connection: Connection, send_soon: Callable[[], None], actor: str) -> None:
        super().__init__(connection, {}, send_soon)
        self._actor = actor

    def taken(self, ask_id: int) -> None:
        self._connection.take_tell(self._actor)
        self._send_soon()


class RemoteSource:
    """The producer of a stream, at the other end of the link."""

    __slots__ = ("_connection", "_id", "_send_soon", "_streams")

    def __init__(
        self, connection: Connection, streams: dict[int, ItemStream], send_soon: Callable[[], None], stream_id: int
    ) -> None:
        """`streams`: the link's, by id, of which this one is taken when its consumer leaves."""
        self._connection = connection
        self._streams = streams
        self._send_soon = send_soon
        self._id = stream_id

    def took_item(self) -> None:
        self._connection.take_item(self._id)
        self._send_soon()

    def left(self) -> None:
        if self._streams.pop(self._id, None) is not None:
            self._connection.cancel(self._id)
            self._send_soon()
