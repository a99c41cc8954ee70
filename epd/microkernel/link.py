"""One socket that pumps one protocol.Connection.

Owns: the futures, streams and replies that wait for the other end, and fails them all when the link is lost. Decides nothing
about the wire (the Connection does) nor about which links there are (`Peers` does).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol, TypeVar, assert_never, cast

from epd.errors import BodyTooLarge, CorruptTransfer, EpdError, Overloaded, PeerLost, Refused, from_wire
from epd.microkernel.actor import Answer, Buffer, Mail, Reply
from epd.microkernel.itemstream import ItemStream
from epd.microkernel.remote import RemoteSource, RemoteWay, TellWay
from epd.microkernel.sockets import tune
from epd.microkernel.turns import Turns
from protocol import events
from protocol.connection import Connection
from protocol.frames import DEFAULT_LIMITS, MessageTooLarge
from protocol.handshake import NONCE_BYTES, Identity, Side
from protocol.messages import Message, WorkerId

HEARTBEAT_S: Final = 0.5
_CHUNKS_PER_TURN: Final = 2  # then reading and everybody else get a turn
_SURELY_ALONE: Final = 16
_JOIN_BYTES: Final = 64 << 10  # small frames up to here go to the socket in one piece
_BACKLOG_BYTES: Final = 8 << 20  # small frames that wait for the socket: asks wait from here on
_CLOSE_TIMEOUT_S: Final = 1.0
_MAX_STREAMS: Final = DEFAULT_LIMITS.max_open_asks // 4
_MAX_ASKS: Final = DEFAULT_LIMITS.max_open_asks - _MAX_STREAMS
_REFUSALS: Final = frozenset({"wrong_version", "wrong_token", "same_worker"})
T = TypeVar("T")


class LinkHost(Protocol):
    """What a link needs of the system that it belongs to."""

    def link_proved(self, link: Link, peer: Identity) -> tuple[str, str] | None:
        """A dialer has proved itself: None lets it in, (code, reason) refuses it."""

    def link_opened(self, link: Link, peer: Identity) -> None: ...

    def link_lost(self, link: Link, error: EpdError, code: str) -> None:
        """Called once per link, also for one that never opened."""

    def deliver(self, mail: Mail, actor: str) -> None: ...


class Link(asyncio.BufferedProtocol):
    """Made by `Peers` for either end; usable between `link_opened` and `link_lost`."""

    def __init__(
        self,
        host: LinkHost,
        *,
        side: Side,
        identity: Identity,
        token: bytes,
        medium: str,
        expected: WorkerId | None = None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.side = side
        self.medium: Final = medium
        self.peer = WorkerId("")
        self._host = host
        self._connection = Connection(
            side=side, identity=identity, token=token, nonce=secrets.token_bytes(NONCE_BYTES), expected=expected
        )
        self.get_buffer = self._connection.get_buffer  # type: ignore[method-assign]  # no frame between loop and reader
        self._data_to_send = self._connection.data_to_send
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._heartbeat_s = heartbeat_s
        self._timer: asyncio.TimerHandle | None = None
        self._is_lost = False
        self.is_open = False
        self.is_paused = True  # until there is a socket
        self._is_turn_planned = False
        self._num_alone = 0  # turns in a row in which one thing was sent
        self._asks: dict[int, asyncio.Future[Answer]] = {}
        self._streams: dict[int, ItemStream] = {}
        self._replies: dict[int, Reply] = {}
        self._tell_replies: dict[str, Reply] = {}
        self._way = RemoteWay(self._connection, self._replies, self._send_soon)
        self._tells = Turns(self._connection.tell_room)
        self._drain_waiters: list[asyncio.Future[None]] = []

    # --- asking -----------------------------------------------------------------------------------------------------

    def ask(
        self, actor: str, message: Message, buffers: Sequence[Buffer], into: Sequence[memoryview] | None
    ) -> tuple[int, asyncio.Future[Answer]]:
        """The future gets the Answer or PeerLost. A Failed answer is an Answer here."""
        if not self.is_open or len(self._asks) >= _MAX_ASKS:
            raise self._no_room()
        try:
            ask_id = self._connection.send_ask(actor, message, buffers, into=into)
        except MessageTooLarge as error:
            raise BodyTooLarge(str(error)) from None
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._asks[ask_id] = future
        self._send_soon()
        return ask_id, future

    def cancel_ask(self, ask_id: int) -> None:
        """The answer is not wanted any more; registered views are not written to from now on."""
        if self._asks.pop(ask_id, None) is not None:
            self._connection.cancel(ask_id)
            self._send_soon()

    def open_stream(
        self, actor: str, message: Message, buffers: Sequence[Buffer], items: ItemStream, *, window: int
    ) -> RemoteSource:
        if not self.is_open or len(self._streams) >= _MAX_STREAMS:
            raise self._no_room()
        try:
            stream_id = self._connection.send_stream(actor, message, buffers, window=window)
        except MessageTooLarge as error:
            raise BodyTooLarge(str(error)) from None
        self._streams[stream_id] = items
        self._send_soon()
        return RemoteSource(self._connection, self._streams, self._send_soon, stream_id)

    async def tell(self, actor: str, message: Message, buffers: Sequence[Buffer], *, timeout_s: float) -> None:
        """Waits for credit. Raises Overloaded after `timeout_s`, PeerLost."""
        self._check_open()
        if not self._tells.is_free(actor):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._tells.take(actor)
            except TimeoutError:
                raise Overloaded(f"actor {actor!r} of worker {self.peer!r} took no tell for {timeout_s:g} s") from None
            self._check_open()
        try:
            self._connection.send_tell(actor, message, buffers)
        except MessageTooLarge as error:
            raise BodyTooLarge(str(error)) from None
        finally:
            self._tells.offer(actor)
        self._send_soon()

    @property
    def is_choked(self) -> bool:
        """The other end does not read: wait with drained() before sending more. Never while not `is_paused`."""
        return self.is_paused and self._connection.backlog_bytes > _BACKLOG_BYTES

    async def drained(self, timeout_s: float) -> None:
        """Wait until everything sent has been handed to the socket. Raises Overloaded, PeerLost."""
        while not self._is_drained:
            self._check_open()
            waiter = self._loop.create_future()
            self._drain_waiters.append(waiter)
            try:
                async with asyncio.timeout(timeout_s):
                    await waiter
            except TimeoutError:
                raise Overloaded(f"the link to {self.peer!r} did not drain within {timeout_s:g} s") from None

    # --- socket -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # pause as soon as the socket takes no more
        with suppress(OSError):  # the peer may have gone already, which is noticed by itself
            tune(transport.get_extra_info("socket"))
        self._timer = self._loop.call_later(self._heartbeat_s, self._tick)
        self.resume_writing()

    def buffer_updated(self, nbytes: int) -> None:
        for event in self._connection.buffer_updated(nbytes):
            if self._is_lost:
                break
            self._handle(event)
        self._send_soon()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        if not self._is_lost:
            self.is_paused = False
            self._send_soon()
            self._wake_drained()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(PeerLost(f"the link to {self.peer or 'a peer'} broke" + (f": {exc}" if exc else "")), "reset")

    def close(self, code: str, reason: str) -> None:
        """Say goodbye and close; everything unfinished fails with PeerLost."""
        if not self._is_lost:
            self._handle(self._connection.close(code, reason))

    def abort(self) -> None:
        """Close without a word."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(PeerLost(f"the link to {self.peer!r} was aborted"), "aborted")

    @property
    def num_unfinished(self) -> int:
        """Asks, streams and replies that wait for something, and messages in transit. 0 at idle."""
        unanswered = len(self._asks) + len(self._streams) + len(self._replies)
        return self._tells.num_waiting + max(unanswered, self._connection.num_unfinished)

    # --- events -----------------------------------------------------------------------------------------------------

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.Answered():
                future = self._asks.pop(event.id, None)
                if future is None or future.done():
                    return
                if event.mismatched:
                    future.set_exception(CorruptTransfer("the answer's buffers do not fit the memory given for them"))
                else:
                    future.set_result(Answer(event.message, event.buffers))
            case events.Delivered():
                self._deliver(event)
            case events.ItemArrived():
                # An event before this one, in the same bytes, may have let the consumer leave. Likewise below.
                if (items := self._streams.get(event.id)) is not None:
                    items.push(Answer(event.message, event.buffers))
            case events.StreamEnded():
                if (items := self._streams.pop(event.id, None)) is not None:
                    items.finish(None if event.failed is None else from_wire(event.failed))
            case events.Cancelled():
                if (reply := self._replies.pop(event.id, None)) is not None:
                    reply.cancel()
            case events.TellRoom():
                self._tells.offer(event.actor)
            case events.ItemRoom():
                if (reply := self._replies.get(event.id)) is not None:
                    reply.room_opened()
            case events.PeerProved():
                self.peer = event.peer.worker
                refusal = self._host.link_proved(self, event.peer)
                self._handle(self._connection.accept() if refusal is None else self._connection.close(*refusal))
            case events.Opened():
                self.peer = event.peer.worker
                self.is_open = True
                self._host.link_opened(self, event.peer)
            case events.Closed():
                self._closed(event)
            case _:
                assert_never(event)

    def _deliver(self, event: events.Delivered) -> None:
        if event.kind == "tell":
            reply = self._tell_replies.get(event.actor)
            if reply is None:
                way = TellWay(self._connection, self._send_soon, event.actor)
                reply = self._tell_replies[event.actor] = Reply("tell", way, 0, True)
        else:
            reply = self._replies[event.id] = Reply(event.kind, self._way, event.id)
        self._host.deliver(Mail(event.message, event.buffers, reply, self.peer), event.actor)

    def _closed(self, event: events.Closed) -> None:
        who = f"worker {self.peer!r}" if self.peer else "a peer"
        what = f"{who} closed the link" if event.by_peer else f"the link to {who} was closed"
        error_type = Refused if event.code in _REFUSALS else PeerLost
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._data_to_send()))  # the last word, behind what the socket has not taken yet
            self._transport.close()
            # A peer that does not read would keep the socket and its buffers for ever.
            self._loop.call_later(_CLOSE_TIMEOUT_S, self._transport.abort)
        self._lose(error_type(f"{what}: {event.reason}"), event.code)

    def _lose(self, error: EpdError, code: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self.is_open = False
        self.is_paused = True
        if self._timer is not None:
            self._timer.cancel()
        self._connection.close("lost", error.message)  # lets go of registered views
        for future in _taken(self._asks):
            if not future.done():
                future.set_exception(error)
        for stream in _taken(self._streams):
            stream.finish(error)
        for reply in _taken(self._replies):
            reply.cancel()
        self._tells.end()
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._host.link_lost(self, error, code)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._heartbeat_s, self._tick)
        for event in self._connection.tick():
            self._handle(event)
        self._send_soon()

    # --- writing ----------------------------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        """What is first sent in a turn of the loop goes to the socket at once, whatever follows in that turn goes together.

        To know when a turn ends costs one. On a link where nothing ever followed, only every so many turns is looked at.
        """
        if not self._is_turn_planned and not self.is_paused and (pieces := self._data_to_send()):
            self._num_alone += 1
            self._write(pieces)
            if self._connection.has_bulk or self._num_alone < _SURELY_ALONE or self._num_alone % _SURELY_ALONE == 0:
                self._is_turn_planned = True
                self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._is_turn_planned = False
        if self._connection.has_data:
            self._num_alone = 0
            self._send_soon()

    def _write(self, pieces: list[Buffer]) -> None:
        """Hand the socket what it takes, a little at a time: others want their turn too."""
        transport = self._transport
        if transport is None:
            return
        for left in reversed(range(_CHUNKS_PER_TURN)):
            if len(pieces) == 1:
                transport.write(pieces[0])
            elif sum(map(len, pieces)) <= _JOIN_BYTES:
                transport.write(b"".join(pieces))
            else:
                transport.writelines(pieces)
            if not left or self.is_paused or not self._connection.has_bulk:
                break
            pieces = self._data_to_send()
        if self._drain_waiters:
            self._wake_drained()

    def _wake_drained(self) -> None:
        if self._is_drained:
            waiters, self._drain_waiters = self._drain_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    @property
    def _is_drained(self) -> bool:
        """The socket has been handed everything."""
        return not (self.is_paused or self._connection.has_data)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self.is_open:
            raise PeerLost(f"the link to {self.peer!r} is lost")

    def _no_room(self) -> EpdError:
        if self.is_open:
            return Overloaded(f"too many unfinished asks on the link to {self.peer!r}")
        return PeerLost(f"the link to {self.peer!r} is lost")


def _taken(table: dict[int, T]) -> list[T]:
    """What was in it. It is emptied and not replaced, since others hold it too."""
    found = list(table.values())
    table.clear()
    return found
