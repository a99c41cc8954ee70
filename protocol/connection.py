"""One link's wire state: who may say what when, what is unanswered, who has how much room.

Owns the connection's states, the tables of asks and streams of both ends, the credit of tells and items, and heartbeats. Is
given bytes and the time, and gives events and buffers back. Does not know sockets, clocks, tasks or actors.

The states are the table `_ALLOWED`: which frame kinds may arrive in which state. After an error the connection is CLOSED, its
last word (GOODBYE) is in data_to_send(), and nothing that arrives later is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from protocol import codec, events
from protocol.codec import Credit, Goodbye, encode, encode_envelope
from protocol.credit import Intake
from protocol.events import Event
from protocol.frames import DEFAULT_LIMITS, Buffer, Kind, Limits, ProtocolError
from protocol.handshake import Identity, Side, check_proof, hello_body, hello_id, proof, read_hello
from protocol.messages import Failed, Message, WorkerId
from protocol.reader import DISCARD, Frame, FrameReader, Sinks
from protocol.writer import FrameWriter

MAX_MISSED_HEARTBEATS: Final = 4
_MAX_HANDSHAKE_BEATS: Final = 10
DEFAULT_CHUNK_BYTES: Final = 512 << 10


# Plain numbers: looking a member up on an enum for every frame would cost more than sending it.
_PING, _PONG, _TELL, _ASK, _ANSWER = (int(kind) for kind in (Kind.PING, Kind.PONG, Kind.TELL, Kind.ASK, Kind.ANSWER))
_STREAM, _ITEM, _END, _CANCEL, _CREDIT = (int(kind) for kind in (Kind.STREAM, Kind.ITEM, Kind.END, Kind.CANCEL, Kind.CREDIT))


class State(Enum):
    AWAIT_HELLO = "await hello"
    AWAIT_PROOF = "await proof"
    AWAIT_VERDICT = "await verdict"  # listener only: the peer has proved itself, accept() or refuse() is due
    OPEN = "open"
    CLOSED = "closed"


_ALLOWED: Final[dict[State, frozenset[Kind]]] = {
    State.AWAIT_HELLO: frozenset({Kind.HELLO, Kind.GOODBYE}),
    State.AWAIT_PROOF: frozenset({Kind.PROOF, Kind.GOODBYE}),
    State.AWAIT_VERDICT: frozenset({Kind.GOODBYE}),
    State.OPEN: frozenset(set(Kind) - {Kind.HELLO, Kind.PROOF, Kind.DATA, Kind.ABANDON}),  # the last two stay in the reader
    State.CLOSED: frozenset(),
}


class Connection:
    """`side`: which end this is. `expected`: the worker that was dialled, where it is known."""

    def __init__(
        self,
        *,
        side: Side,
        identity: Identity,
        token: bytes,
        nonce: bytes,
        expected: WorkerId | None = None,
        limits: Limits = DEFAULT_LIMITS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self.side = side
        self.peer: Identity | None = None
        self._identity = identity
        self._token = token
        self._expected = expected
        self._limits = limits
        self._reader = FrameReader(limits, self._choose_sinks)
        self._writer = FrameWriter(limits, chunk_bytes=chunk_bytes)
        self.get_buffer: Final = self._reader.get_buffer
        self.data_to_send: Final = self._writer.data_to_send
        self._send: Final = self._writer.send
        self._bulk: Final = self._writer.turns
        self._own_hello = hello_body(side, identity, nonce)
        self._peer_hello = b""
        self._next_id = 1 if side is Side.DIALER else 2  # odd: the dialer's, even: the listener's
        self._asks: dict[int, Sequence[memoryview] | None] = {}  # ours, unanswered -> sinks
        self._streams: dict[int, Intake] = {}  # ours, unfinished
        self._peer_asks: set[int] = set()  # theirs, unanswered
        self._peer_streams: dict[int, int] = {}  # theirs, unfinished -> items that they have room for
        self._tell_room: dict[str, int] = {}  # their actor -> tells it has room for
        self._tell_intake: dict[str, Intake] = {}  # our actor
        self._beats = 0
        self._missed = 0
        self._heard = False
        self._enter(State.AWAIT_HELLO)
        if side is Side.DIALER:
            self._send(Kind.HELLO, hello_id(), self._own_hello)

    # --- bytes in ---------------------------------------------------------------------------------------------------

    def buffer_updated(self, num_bytes: int) -> list[Event]:
        """What follows from `num_bytes` more bytes in get_buffer(). Never raises: a peer's mistake is a Closed event."""
        self._heard = True
        if self.state is State.CLOSED:
            return []
        found: list[Event] = []
        reader = self._reader
        try:
            reader.buffer_updated(num_bytes)
            while (frame := reader.next_frame()) is not None:
                handler = self._handlers.get(frame.kind)
                if handler is None:
                    raise ProtocolError("bad_frame", f"{Kind(frame.kind).name} in state {self.state.value!r}")
                event = handler(frame)
                if event is not None:
                    found.append(event)
                if reader.is_empty or not self._handlers:
                    break
        except ProtocolError as error:
            found.append(self.close(error.code, error.reason))
        except codec.UNREADABLE as error:
            found.append(self.close("bad_message", str(error)))
        return found

    def tick(self) -> list[Event]:
        """Called every heartbeat interval: sends one heartbeat, and gives up on a peer that missed MAX_MISSED_HEARTBEATS.

        Beats are counted, not clocked, so that a stall of this process is not taken for the peer's silence.
        """
        if self.state is State.CLOSED:
            return []
        self._missed = 0 if self._heard else self._missed + 1
        self._heard = False
        self._beats += 1
        if self._missed >= MAX_MISSED_HEARTBEATS:
            return [self.close("silent", f"nothing was heard for {self._missed} heartbeats")]
        if self._writer.small_bytes > self._limits.max_backlog_bytes:
            return [self.close("too_slow", f"{self._writer.small_bytes} bytes wait for the other end to read")]
        if self.is_open:
            self._send(_PING, self._beats, b"")
        elif self._beats >= _MAX_HANDSHAKE_BEATS:
            return [self.close("silent", "the handshake was not finished in time")]
        return []

    # --- verdict and end --------------------------------------------------------------------------------------------

    def accept(self) -> Event:
        """Let the peer in, which proves this end to it."""
        if self.state is not State.AWAIT_VERDICT or self.peer is None:
            raise RuntimeError(f"accept() in state {self.state.value!r}")
        self._send(Kind.PROOF, 0, proof(self._token, self.side, *self._hellos()))
        return self._open(self.peer)

    def close(self, code: str, reason: str) -> events.Closed:
        """Say goodbye. Nothing is sent or looked at afterwards; what was unfinished is the caller's to fail."""
        if self.state is not State.CLOSED:
            self._enter(State.CLOSED)
            self._forget()
            self._send(Kind.GOODBYE, 0, encode(Goodbye(code, reason[:1000])))
        return events.Closed(code=code, reason=reason, by_peer=False)

    # --- this end asks ----------------------------------------------------------------------------------------------

    def tell_room(self, actor: str) -> int:
        """Tells that may be sent to this actor now."""
        return self._tell_room.get(actor, self._limits.tell_window)

    def send_tell(self, actor: str, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        room = self._tell_room.get(actor, self._limits.tell_window)
        if not self.is_open:
            raise self._not_open()
        if room <= 0:
            raise RuntimeError(f"no room for a tell to {actor!r}")
        self._send(_TELL, self._next_id, encode_envelope(actor, message), buffers)
        self._next_id += 2
        self._tell_room[actor] = room - 1

    def send_ask(
        self, actor: str, message: Message, buffers: Sequence[Buffer] = (), *, into: Sequence[memoryview] | None = None
    ) -> int:
        """The id under which it will be Answered. `into`: flat writable byte views for the answer's buffers."""
        if not self.is_open:
            raise self._not_open()
        ask_id = self._next_id
        self._send(_ASK, ask_id, encode_envelope(actor, message), buffers)
        self._next_id = ask_id + 2
        self._asks[ask_id] = into
        return ask_id

    def send_stream(self, actor: str, message: Message, buffers: Sequence[Buffer] = (), *, window: int) -> int:
        """The id under which items arrive. At most `window` of them are on their way or untaken."""
        if not self.is_open:
            raise self._not_open()
        if not 0 < window <= self._limits.max_stream_window:
            raise ValueError(f"a stream's window is between 1 and {self._limits.max_stream_window}")
        stream_id = self._next_id
        self._send(_STREAM, stream_id, encode_envelope(actor, message, window), buffers)
        self._next_id = stream_id + 2
        self._streams[stream_id] = Intake(window)
        return stream_id

    def cancel(self, ask_id: int) -> None:
        """This end does not want that ask's answer, or that stream's items, any more. Registered views are let go at once."""
        if self._asks.pop(ask_id, self) is self and self._streams.pop(ask_id, None) is None:
            return
        self._reader.discard(ask_id)
        self._writer.abandon(ask_id)
        if self.is_open:
            self._send(_CANCEL, ask_id, b"")

    def take_item(self, stream_id: int) -> None:
        """An item of this end's stream has been taken: there is room for another."""
        intake = self._streams.get(stream_id)
        if intake is not None and (count := intake.take()):
            self._send(_CREDIT, stream_id, encode(Credit("", count)))

    # --- this end answers -------------------------------------------------------------------------------------------

    def take_tell(self, actor: str) -> None:
        """A tell has left this actor's mailbox: there is room for another."""
        intake = self._tell_intake.get(actor)
        if intake is not None and (count := intake.take()) and self.is_open:
            self._send(_CREDIT, 0, encode(Credit(actor, count)))

    def send_answer(self, ask_id: int, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Nothing is sent if the asker has left meanwhile."""
        if ask_id in self._peer_asks:
            self._send(_ANSWER, ask_id, encode(message), buffers)
            self._peer_asks.remove(ask_id)

    def item_room(self, stream_id: int) -> int:
        """Items that may be sent now; -1 if whoever asked has left."""
        return self._peer_streams.get(stream_id, -1)

    def send_item(self, stream_id: int, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        room = self._peer_streams[stream_id]
        if room <= 0:
            raise RuntimeError("no room for an item")
        self._send(_ITEM, stream_id, encode(message), buffers)
        self._peer_streams[stream_id] = room - 1

    def send_end(self, stream_id: int, failed: Failed | None = None) -> None:
        """Nothing is sent if whoever asked has left meanwhile."""
        if self._peer_streams.pop(stream_id, None) is not None:
            self._send(_END, stream_id, b"" if failed is None else encode(failed))

    # --- what is there ----------------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether data_to_send() would return anything."""
        return self._writer.has_data

    @property
    def has_bulk(self) -> bool:
        """Whether a chunk of a large message is due."""
        return bool(self._bulk)

    @property
    def backlog_bytes(self) -> int:
        """Small frames that data_to_send() has not returned yet."""
        return self._writer.small_bytes

    @property
    def num_unfinished(self) -> int:
        """Asks and streams of either end, and messages in transit. 0 at idle."""
        asked = len(self._asks) + len(self._streams) + len(self._peer_asks) + len(self._peer_streams)
        return asked + self._reader.num_transfers + self._writer.num_transfers

    # --- frames in --------------------------------------------------------------------------------------------------

    def _on_hello(self, frame: Frame) -> Event | None:
        self._peer_hello = bytes(frame.body)
        self.peer = read_hello(frame.id, frame.body, own=self.side, identity=self._identity, expected=self._expected)
        if self.side is Side.LISTENER:
            self._send(Kind.HELLO, hello_id(), self._own_hello)
        else:
            self._send(Kind.PROOF, 0, proof(self._token, self.side, *self._hellos()))
        self._enter(State.AWAIT_PROOF)
        return None

    def _on_proof(self, frame: Frame) -> Event:
        check_proof(self._token, self.side.other, *self._hellos(), frame.body)
        assert self.peer is not None
        if self.side is Side.DIALER:
            return self._open(self.peer)
        self._enter(State.AWAIT_VERDICT)
        return events.PeerProved(self.peer)

    def _on_goodbye(self, frame: Frame) -> Event:
        goodbye = codec.decode_goodbye(frame.body)
        self._enter(State.CLOSED)
        self._forget()
        return events.Closed(code=goodbye.code, reason=goodbye.reason, by_peer=True)

    def _on_ping(self, frame: Frame) -> None:
        self._send(_PONG, frame.id, b"")

    def _on_pong(self, frame: Frame) -> None:
        """That anything has arrived is all that there is to know of it."""

    def _on_tell(self, frame: Frame) -> Event:
        self._check_new_id(frame)
        envelope = codec.decode_envelope(frame.body)
        intake = self._tell_intake.get(envelope.actor)
        if intake is None:
            if len(self._tell_intake) >= self._limits.max_actors:
                raise ProtocolError("too_large", f"tells to more than {self._limits.max_actors} actors")
            intake = self._tell_intake[envelope.actor] = Intake(self._limits.tell_window)
        intake.arrive("tells")
        return events.Delivered("tell", 0, envelope.actor, envelope.message, frame.buffers)

    def _on_ask(self, frame: Frame) -> Event:
        self._check_new_id(frame)
        envelope = codec.decode_envelope(frame.body)
        self._peer_asks.add(frame.id)
        return events.Delivered("ask", frame.id, envelope.actor, envelope.message, frame.buffers)

    def _on_stream(self, frame: Frame) -> Event:
        self._check_new_id(frame)
        envelope = codec.decode_envelope(frame.body)
        if not 0 < envelope.window <= self._limits.max_stream_window:
            raise ProtocolError("bad_frame", f"a stream with a window of {envelope.window}")
        self._peer_streams[frame.id] = envelope.window
        return events.Delivered("stream", frame.id, envelope.actor, envelope.message, frame.buffers)

    def _on_answer(self, frame: Frame) -> Event | None:
        if frame.id not in self._asks:
            self._check_own_id(frame)
            return None  # cancelled meanwhile
        message = codec.decode_message(frame.body) if frame.body or not frame.discarded else _MISMATCHED
        del self._asks[frame.id]
        return events.Answered(frame.id, message, frame.buffers, frame.discarded)

    def _on_item(self, frame: Frame) -> Event | None:
        intake = self._streams.get(frame.id)
        if intake is None:
            self._check_own_id(frame)
            return None
        message = codec.decode_message(frame.body)
        intake.arrive("items")
        return events.ItemArrived(frame.id, message, frame.buffers)

    def _on_end(self, frame: Frame) -> Event | None:
        if frame.id not in self._streams:
            self._check_own_id(frame)
            return None
        failed = codec.decode_failed(frame.body) if frame.body else None
        del self._streams[frame.id]
        return events.StreamEnded(frame.id, failed)

    def _on_cancel(self, frame: Frame) -> Event | None:
        if (frame.id & 1) == (self._next_id & 1):
            raise ProtocolError("bad_frame", f"CANCEL for id {frame.id}, which is not the peer's")
        self._writer.abandon(frame.id)
        if frame.id in self._peer_asks:
            self._peer_asks.remove(frame.id)
        elif self._peer_streams.pop(frame.id, None) is None:
            return None  # answered meanwhile
        return events.Cancelled(frame.id)

    def _on_credit(self, frame: Frame) -> Event | None:
        credit = codec.decode_credit(frame.body)
        if credit.count <= 0:
            raise ProtocolError("bad_frame", f"CREDIT of {credit.count}")
        if credit.actor:
            room = self._tell_room.get(credit.actor)
            if room is None or room + credit.count > self._limits.tell_window:
                raise ProtocolError("bad_frame", f"CREDIT for tells to {credit.actor!r} that were not sent")
            self._tell_room[credit.actor] = room + credit.count
            return events.TellRoom(credit.actor)
        if frame.id not in self._peer_streams:
            return None  # ended meanwhile
        room = self._peer_streams[frame.id] + credit.count
        if room > self._limits.max_stream_window:
            raise ProtocolError("bad_frame", f"CREDIT of {credit.count} for stream {frame.id}")
        self._peer_streams[frame.id] = room
        return events.ItemRoom(frame.id)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _choose_sinks(self, kind: int, frame_id: int, sizes: Sequence[int]) -> Sinks:
        if kind == _ANSWER:
            if frame_id not in self._asks:
                return DISCARD
            into = self._asks[frame_id]
            if into is not None and [view.nbytes for view in into] != list(sizes):
                return DISCARD
            return into
        if kind == _ITEM and frame_id not in self._streams:
            return DISCARD
        return None

    def _enter(self, state: State) -> None:
        self.state = state
        self.is_open = state is State.OPEN
        self._handlers: dict[int, Callable[[Frame], Event | None]] = {
            int(kind): getattr(self, f"_on_{kind.name.lower()}") for kind in _ALLOWED[state]
        }

    def _open(self, peer: Identity) -> Event:
        self._enter(State.OPEN)
        self._reader.only_handshake = False
        return events.Opened(peer)

    def _hellos(self) -> tuple[bytes, bytes]:
        if self.side is Side.DIALER:
            return self._own_hello, self._peer_hello
        return self._peer_hello, self._own_hello

    def _not_open(self) -> RuntimeError:
        return RuntimeError(f"send in state {self.state.value!r}")

    def _check_new_id(self, frame: Frame) -> None:
        """Ids that the peer gives are its own parity and never given twice."""
        frame_id = frame.id
        if not frame_id or not (frame_id ^ self._next_id) & 1:
            raise ProtocolError("bad_frame", f"{Kind(frame.kind).name} with id {frame_id}, which is not the peer's to give")
        if frame_id in self._peer_asks or frame_id in self._peer_streams:
            raise ProtocolError("bad_frame", f"id {frame_id} is given twice")
        if len(self._peer_asks) + len(self._peer_streams) >= self._limits.max_open_asks:
            raise ProtocolError("too_large", f"more than {self._limits.max_open_asks} unfinished asks")

    def _check_own_id(self, frame: Frame) -> None:
        if (frame.id & 1) != (self._next_id & 1) or frame.id >= self._next_id:
            raise ProtocolError("bad_frame", f"{Kind(frame.kind).name} for id {frame.id}, which was never asked")

    def _forget(self) -> None:
        self._reader.stop()
        self._writer.stop()
        self._asks.clear()
        self._streams.clear()
        self._peer_asks.clear()
        self._peer_streams.clear()


_MISMATCHED: Final = Failed(code="corrupt_transfer", message="the answer's buffers do not have the sizes that were registered")
