"""One link's state machine: who may say what, who has how much room, what is forgotten when."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protocol import codec
from protocol.codec import Credit
from protocol.connection import _ALLOWED, MAX_MISSED_HEARTBEATS, Connection, State
from protocol.events import (
    Answered,
    Cancelled,
    Closed,
    Delivered,
    Event,
    ItemArrived,
    ItemRoom,
    StreamEnded,
    TellRoom,
)
from protocol.frames import DEFAULT_LIMITS, FLAG_DEFERRED, HEADER, Kind, Limits
from protocol.messages import Failed, ReleaseLease
from tests.support.wire import Pair, feed, taken

CHUNK = 65536
MESSAGE = ReleaseLease(1)


def frame(kind: int, frame_id: int, body: bytes = b"", *, flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, len(body), frame_id) + body


def closed_code(found: list[Event]) -> str:
    """The code of the one Closed event, which must be the last."""
    codes = [event.code for event in found if isinstance(event, Closed)]
    assert len(codes) == 1
    assert isinstance(found[-1], Closed)
    return codes[0]


def test_ask_and_answer_both_ways_at_once() -> None:
    pair = Pair().open()
    first, second = pair.dialer.send_ask("x", MESSAGE), pair.listener.send_ask("y", MESSAGE)
    pair.pump()
    at_dialer, at_listener = pair.take_events()
    assert at_dialer == [Delivered("ask", second, "y", MESSAGE, ())]
    assert at_listener == [Delivered("ask", first, "x", MESSAGE, ())]
    pair.listener.send_answer(first, ReleaseLease(2), [b"ab"])
    pair.dialer.send_answer(second, Failed("c", "m"))
    pair.pump()
    assert pair.take_events() == (
        [Answered(first, ReleaseLease(2), (b"ab",))],
        [Answered(second, Failed("c", "m"), ())],
    )
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 30])
def test_large_buffers_are_received_into_the_given_memory(piece: int) -> None:
    pair = Pair(chunk_bytes=CHUNK, sizes=lambda: piece).open()
    data = [bytes([i]) * size for i, size in enumerate((100_000, 0, 3, 70_000), start=1)]
    room = [memoryview(bytearray(len(part))) for part in data]
    ask_id = pair.dialer.send_ask("x", MESSAGE, into=room)
    pair.pump()
    pair.listener.send_answer(ask_id, MESSAGE, data)
    pair.pump()
    (answered,), _ = pair.take_events()
    assert isinstance(answered, Answered)
    assert [view.obj for view in room] == data
    assert all(got is given for got, given in zip(answered.buffers, room, strict=True))


@pytest.mark.parametrize("size", [100, 200_000])
def test_memory_of_another_size_is_left_alone(size: int) -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    room = bytearray(size + 1)
    ask_id = pair.dialer.send_ask("x", MESSAGE, into=[memoryview(room)])
    pair.pump()
    pair.listener.send_answer(ask_id, MESSAGE, [b"\xff" * size])
    pair.pump()
    (answered,), _ = pair.take_events()
    assert isinstance(answered, Answered)
    assert answered.mismatched
    assert not any(room)


def test_memory_is_let_go_of_midway() -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    room = bytearray(5 * CHUNK)
    ask_id = pair.dialer.send_ask("x", MESSAGE, into=[memoryview(room)])
    pair.pump()
    pair.take_events()
    pair.listener.send_answer(ask_id, MESSAGE, [b"\xff" * len(room)])
    first = b"".join(pair.listener.data_to_send()) + b"".join(pair.listener.data_to_send())
    feed(pair.dialer, first[: CHUNK + CHUNK // 2])
    assert room[0] == 0xFF
    pair.dialer.cancel(ask_id)
    before = bytes(room)
    feed(pair.dialer, first[CHUNK + CHUNK // 2 :])
    pair.pump()
    assert room == before
    assert pair.take_events() == ([], [])  # it had been answered: nobody is to be told
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0
    assert pair.dialer.is_open
    assert pair.listener.is_open


@pytest.mark.parametrize("size", [10, 5 * CHUNK])
@pytest.mark.parametrize("num_chunks_sent", [0, 2])
def test_an_ask_is_cancelled_wherever_it_is(size: int, num_chunks_sent: int) -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    ask_id = pair.dialer.send_ask("x", MESSAGE, [bytes(size)])
    for _ in range(num_chunks_sent):
        for part in pair.dialer.data_to_send():
            feed(pair.listener, part)
    pair.dialer.cancel(ask_id)
    pair.dialer.cancel(ask_id)
    pair.pump()
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0
    pair.listener.send_answer(ask_id, MESSAGE)
    assert taken(pair.listener) == b""


def test_cancelling_a_delivered_ask_is_reported() -> None:
    pair = Pair().open()
    ask_id = pair.dialer.send_ask("x", MESSAGE)
    pair.pump()
    pair.take_events()
    pair.dialer.cancel(ask_id)
    pair.pump()
    assert pair.take_events() == ([], [Cancelled(ask_id)])


def test_an_answer_that_crosses_a_cancel_is_dropped() -> None:
    pair = Pair().open()
    ask_id = pair.dialer.send_ask("x", MESSAGE)
    pair.pump()
    pair.take_events()
    pair.listener.send_answer(ask_id, MESSAGE, [bytes(CHUNK * 2)])
    pair.dialer.cancel(ask_id)
    pair.pump()
    assert pair.take_events() == ([], [])
    assert pair.dialer.is_open


def test_tells_stop_at_the_window_and_go_on_with_credit() -> None:
    limits = Limits(tell_window=4)
    pair = Pair(limits=limits).open()
    for _ in range(4):
        pair.dialer.send_tell("x", MESSAGE)
    assert pair.dialer.tell_room("x") == 0
    assert pair.dialer.tell_room("y") == 4
    with pytest.raises(RuntimeError, match="no room"):
        pair.dialer.send_tell("x", MESSAGE)
    pair.pump()
    pair.listener.take_tell("x")
    pair.pump()
    assert pair.dialer.tell_room("x") == 0  # given back in halves
    pair.listener.take_tell("x")
    pair.pump()
    assert pair.dialer.tell_room("x") == 2
    assert pair.take_events()[0] == [TellRoom("x")]


def test_items_stop_at_the_window_and_go_on_with_credit() -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    stream_id = pair.dialer.send_stream("x", MESSAGE, window=2)
    pair.pump()
    assert pair.take_events()[1] == [Delivered("stream", stream_id, "x", MESSAGE, ())]
    assert pair.listener.item_room(stream_id) == 2
    pair.listener.send_item(stream_id, ReleaseLease(10), [b"\x01" * 200_000])
    pair.listener.send_item(stream_id, ReleaseLease(11))
    with pytest.raises(RuntimeError, match="no room"):
        pair.listener.send_item(stream_id, MESSAGE)
    pair.pump()
    at_dialer, _ = pair.take_events()
    assert [(type(event), getattr(event, "message", None)) for event in at_dialer] == [
        (ItemArrived, ReleaseLease(10)),
        (ItemArrived, ReleaseLease(11)),
    ]
    pair.dialer.take_item(stream_id)
    pair.pump()
    assert pair.take_events()[1] == [ItemRoom(stream_id)]
    assert pair.listener.item_room(stream_id) == 1
    pair.listener.send_end(stream_id, Failed("c", "m"))
    pair.listener.send_end(stream_id)
    pair.pump()
    assert pair.take_events()[0] == [StreamEnded(stream_id, Failed("c", "m"))]
    assert pair.listener.item_room(stream_id) == -1
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0


def test_leaving_a_stream_stops_an_item_midway() -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    stream_id = pair.dialer.send_stream("x", MESSAGE, window=2)
    pair.pump()
    pair.listener.send_item(stream_id, MESSAGE, [bytes(5 * CHUNK)])
    pair.listener.send_item(stream_id, MESSAGE)
    for part in pair.listener.data_to_send():
        feed(pair.dialer, part)
    pair.take_events()
    pair.dialer.cancel(stream_id)
    pair.pump()
    assert pair.take_events() == ([], [Cancelled(stream_id)])
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0
    assert pair.dialer.is_open


def test_heartbeats_are_answered_and_a_silent_peer_is_given_up() -> None:
    pair = Pair().open()
    for _ in range(2 * MAX_MISSED_HEARTBEATS):
        assert pair.dialer.tick() == []
        pair.pump()
    assert pair.take_events() == ([], [])
    pair.dialer.tick()
    reported = [event for _ in range(MAX_MISSED_HEARTBEATS) for event in pair.dialer.tick()]
    assert closed_code(reported) == "silent"
    assert pair.dialer.tick() == []


def test_a_peer_that_sends_anything_is_not_silent() -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    ask_id = pair.dialer.send_ask("x", MESSAGE)
    pair.pump()
    pair.listener.send_answer(ask_id, MESSAGE, [bytes(100 * CHUNK)])
    for _ in range(20):
        assert pair.dialer.tick() == []
        for part in pair.listener.data_to_send():
            feed(pair.dialer, part)


def test_a_peer_that_does_not_read_is_given_up() -> None:
    pair = Pair(limits=Limits(max_backlog_bytes=1000)).open()
    for _ in range(100):
        pair.dialer.send_ask("x", MESSAGE)
    assert closed_code(pair.dialer.tick()) == "too_slow"


def test_closing_says_why_and_forgets_everything() -> None:
    pair = Pair(chunk_bytes=CHUNK).open()
    pair.dialer.send_ask("x", MESSAGE, [bytes(5 * CHUNK)])
    pair.listener.send_stream("x", MESSAGE, window=1)
    pair.dialer.data_to_send()
    assert pair.dialer.close("shutdown", "enough") == Closed("shutdown", "enough", False)
    said = taken(pair.dialer)
    assert HEADER.unpack_from(said)[0] == Kind.GOODBYE
    assert pair.dialer.num_unfinished == 0
    assert feed(pair.dialer, b"anything at all") == []
    with pytest.raises(RuntimeError, match="closed"):
        pair.dialer.send_ask("x", MESSAGE)
    fresh = Pair().open()
    assert feed(fresh.listener, said) == [Closed("shutdown", "enough", True)]
    assert taken(fresh.listener) == b""


def test_what_was_said_before_a_goodbye_is_heard() -> None:
    pair = Pair().open()
    pair.dialer.send_tell("x", MESSAGE)
    pair.dialer.close("shutdown", "")
    pair.pump()
    assert [type(event) for event in pair.take_events()[1]] == [Delivered, Closed]


def announce(kind: int, frame_id: int, total: int) -> bytes:
    return HEADER.pack(kind, FLAG_DEFERRED, 1, 0, frame_id) + total.to_bytes(4, "little")


def ask_body(actor: str = "x", window: int = 0) -> bytes:
    return codec.encode_envelope(actor, MESSAGE, window)


@pytest.mark.parametrize(
    "data",
    [
        frame(Kind.HELLO, 1),
        frame(Kind.PROOF, 0, b"x" * 32),
        frame(Kind.ASK, 2, ask_body()),  # an id that is the listener's to give
        frame(Kind.TELL, 0, ask_body()),
        frame(Kind.ASK, 1, ask_body()) * 2,
        frame(Kind.STREAM, 1, ask_body(window=0)),
        frame(Kind.STREAM, 1, ask_body(window=DEFAULT_LIMITS.max_stream_window + 1)),
        frame(Kind.ANSWER, 4, codec.encode(MESSAGE)),  # never asked
        frame(Kind.ITEM, 4, codec.encode(MESSAGE)),
        frame(Kind.END, 4),
        frame(Kind.ANSWER, 1, codec.encode(MESSAGE)),
        frame(Kind.CANCEL, 2),
        frame(Kind.CREDIT, 0, codec.encode(Credit("x", 1))),  # for tells that were not sent
        frame(Kind.CREDIT, 0, codec.encode(Credit("x", 0))),
        frame(Kind.CREDIT, 1, codec.encode(Credit("", -1))),
        frame(Kind.STREAM, 1, ask_body(window=1)) + frame(Kind.CREDIT, 1, codec.encode(Credit("", 2**40))),
        frame(Kind.DATA, 1, b"x"),
        announce(Kind.ASK, 1, 100_000) + frame(Kind.DATA, 1),
        announce(Kind.ASK, 1, 100_000) * 2,
        announce(Kind.ASK, 1, 100_000) + frame(Kind.DATA, 1, bytes(100_001)),
        announce(Kind.ASK, 1, 100_000) + frame(Kind.DATA, 1, bytes(90_000)) + frame(Kind.DATA, 1, bytes(10_001)),
        HEADER.pack(Kind.DATA, 0, 0, DEFAULT_LIMITS.max_chunk_bytes + 1, 1),
        announce(Kind.ASK, 1, 2**31),
        b"".join(announce(Kind.ASK, 2 * i + 1, 70_000) for i in range(DEFAULT_LIMITS.max_transfers + 1)),
        frame(Kind.ABANDON, 1),
        frame(Kind.ASK, 1, b"\xc1"),
        frame(Kind.GOODBYE, 0, b"\xc1"),
        frame(Kind.TELL, 1, ask_body()) * (DEFAULT_LIMITS.tell_window + 1),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_closed(data: bytes) -> None:
    listener = Pair().open().listener
    assert closed_code(feed(listener, data)) in {"bad_frame", "too_large", "bad_message"}
    assert listener.state is State.CLOSED
    said = taken(listener)
    assert HEADER.unpack_from(said)[0] == Kind.GOODBYE
    assert feed(listener, data) == []  # and nothing it says is looked at any more


def test_more_actors_or_asks_than_a_link_may_have() -> None:
    limits = Limits(max_actors=3, max_open_asks=3)
    tells = [frame(Kind.TELL, 2 * i + 1, ask_body(f"actor {i}")) for i in range(4)]
    asks = [frame(Kind.ASK, 2 * i + 1, ask_body()) for i in range(4)]
    for frames in (tells, asks):
        listener = Pair(limits=limits).open().listener
        for data in frames[:3]:
            feed(listener, data)
        assert listener.is_open
        assert closed_code(feed(listener, frames[3])) == "too_large"


def test_more_in_transit_than_a_link_may_have() -> None:
    listener = Pair(limits=Limits(max_transit_bytes=200_000)).open().listener
    assert feed(listener, announce(Kind.ASK, 1, 70_000) + announce(Kind.ASK, 3, 130_000)) == []
    assert closed_code(feed(listener, announce(Kind.ASK, 5, 70_000))) == "too_large"


def test_a_sender_waits_until_there_is_room_in_transit() -> None:
    pair = Pair(limits=Limits(max_transit_bytes=200_000, max_transfers=3), chunk_bytes=CHUNK).open()
    for _ in range(5):
        pair.dialer.send_ask("x", MESSAGE, [bytes(90_000)])
    pair.pump()
    assert [type(event) for event in pair.take_events()[1]] == [Delivered] * 5


def test_a_mistake_does_not_swallow_what_came_before_it() -> None:
    listener = Pair().open().listener
    found = feed(listener, frame(Kind.TELL, 1, ask_body()) + b"\xff" * 64)
    assert [type(event) for event in found] == [Delivered, Closed]


def test_the_table_names_every_kind() -> None:
    handled = frozenset[Kind]().union(*_ALLOWED.values())
    assert handled | {Kind.DATA, Kind.ABANDON} == set(Kind)


@pytest.mark.parametrize("send", [lambda c: c.send_tell("x", MESSAGE), lambda c: c.send_stream("x", MESSAGE, window=1)])
def test_nothing_is_asked_before_the_link_is_open(send: Callable[[Connection], object]) -> None:
    with pytest.raises(RuntimeError, match="await hello"):
        send(Pair().dialer)


@pytest.mark.parametrize("window", [0, DEFAULT_LIMITS.max_stream_window + 1])
def test_a_stream_needs_a_sensible_window(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        Pair().open().dialer.send_stream("x", MESSAGE, window=window)
