"""Arbitrary bytes, arbitrary splits, arbitrary traffic: one error, bounded memory, and nothing lost or reordered."""

from __future__ import annotations

import tracemalloc

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import codec
from protocol.connection import Connection, State
from protocol.events import Answered, Closed, Delivered, ItemArrived, PeerProved, StreamEnded
from protocol.frames import HEADER, Kind, Limits
from protocol.handshake import Side
from protocol.messages import Abort, Message, ReleaseLease
from tests.support.wire import Pair, connection, feed, taken

quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
thoroughly = settings(quickly, max_examples=150)

SMALL = Limits(
    max_inline_bytes=256, max_body_bytes=4096, max_buffers=8, max_buffer_bytes=65536, max_message_bytes=65536,
    max_chunk_bytes=512, max_transfers=4, max_transit_bytes=131072, tell_window=8,
)  # fmt: skip

splits = st.lists(st.integers(16, 3000) | st.integers(1, 20), min_size=1, max_size=20)
ids = st.integers(0, 12) | st.integers(0, 2**64 - 1)
bodies = (
    st.binary(max_size=40)
    | st.builds(codec.encode_envelope, st.sampled_from("xy"), st.builds(ReleaseLease, st.integers(0, 9)), st.integers(0, 20))
    | st.builds(codec.encode, st.builds(ReleaseLease, st.integers(0, 9)))
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame that is nearly right."""
    kind = draw(st.sampled_from(list(Kind)) | st.integers(0, 255))
    flags = draw(st.sampled_from([0, 0, 0, 1, 2]))
    sizes = draw(st.lists(st.integers(0, 300) | st.integers(0, 2**32 - 1), max_size=3)) if draw(st.booleans()) else []
    body = draw(bodies)
    announced = draw(st.just(len(body)) | st.integers(0, 2**32 - 1))
    num_buffers = draw(st.just(len(sizes)) | st.integers(0, 65535))
    rest = b"".join(size.to_bytes(4, "little") for size in sizes)
    return HEADER.pack(kind, flags, num_buffers, announced, draw(ids)) + rest + body + bytes(sum(s for s in sizes if s < 300))


def feed_split(target: Connection, data: bytes, sizes: list[int]) -> list[object]:
    found: list[object] = []
    position = index = 0
    while position < len(data):
        size = sizes[index % len(sizes)]
        found += feed(target, data[position : position + size])
        position, index = position + size, index + 1
    return found


def is_busy(pair: Pair) -> bool:
    return pair.dialer.has_data or pair.listener.has_data


def check_ended_well(target: Connection, found: list[object]) -> None:
    """It is open, or was closed with one reason and said so."""
    closed = [event for event in found if isinstance(event, Closed)]
    assert len(closed) <= 1
    assert bool(closed) == (target.state is State.CLOSED)
    if closed and not closed[0].by_peer:
        said = taken(target)
        assert said
        assert codec.decode_goodbye(last_frame_body(said)).code == closed[0].code


def last_frame_body(data: bytes) -> bytes:
    while True:
        _, flags, num_buffers, body_bytes, _ = HEADER.unpack_from(data)
        end = 16 + 4 * num_buffers + (0 if flags else body_bytes)
        if end == len(data):
            return data[16 + 4 * num_buffers :]
        data = data[end:]


@thoroughly
@given(data=st.binary(max_size=3000), sizes=splits)
def test_bytes_from_a_stranger(data: bytes, sizes: list[int]) -> None:
    listener = connection(Side.LISTENER, "b", limits=SMALL)
    check_ended_well(listener, feed_split(listener, data, sizes))


@thoroughly
@given(parts=st.lists(frames() | st.binary(max_size=30), min_size=1, max_size=12), sizes=splits)
def test_nearly_right_frames_on_an_open_link(parts: list[bytes], sizes: list[int]) -> None:
    pair = Pair(limits=SMALL, chunk_bytes=512).open()
    pair.listener.send_ask("x", ReleaseLease(1), into=[memoryview(bytearray(100))])
    pair.listener.send_stream("x", ReleaseLease(1), window=3)
    taken(pair.listener)
    found = feed_split(pair.listener, b"".join(parts), sizes)
    if pair.listener.state is State.CLOSED:
        check_ended_well(pair.listener, found)


@quickly
@given(parts=st.lists(frames(), min_size=1, max_size=12), sizes=splits)
def test_memory_stays_within_the_limits(parts: list[bytes], sizes: list[int]) -> None:
    pair = Pair(limits=SMALL, chunk_bytes=512).open()
    data = b"".join(parts)
    tracemalloc.start()
    try:
        feed_split(pair.listener, data, sizes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < SMALL.max_transit_bytes + 10 * len(data) + 100_000


messages = st.builds(ReleaseLease, st.integers(0, 2**62)) | st.builds(Abort, st.text(max_size=9), st.integers(0, 9))
payloads = st.lists(st.integers(0, 3000) | st.sampled_from([0, 1, 255, 256, 257, 511, 512, 513]), max_size=4)
acts = st.lists(st.tuples(st.sampled_from(["tell", "ask", "stream"]), messages, payloads), min_size=1, max_size=8)


def filled(sizes: list[int], salt: int) -> list[bytes]:
    return [bytes([(salt + index) % 256]) * size for index, size in enumerate(sizes)]


@quickly
@given(acts=acts, sizes=splits, use_sinks=st.booleans())
def test_whatever_is_sent_arrives_whole_and_once(
    acts: list[tuple[str, Message, list[int]]], sizes: list[int], use_sinks: bool
) -> None:
    """Everything is asked at once and echoed back at once, in pieces of any size."""
    turn = iter(range(10**9))
    pair = Pair(limits=SMALL, chunk_bytes=512, sizes=lambda: sizes[next(turn) % len(sizes)]).open()
    expected: dict[int, tuple[Message, list[bytes]]] = {}
    small_tells: list[tuple[Message, int]] = []
    for index, (kind, message, payload) in enumerate(acts):
        data = filled(payload, index)
        if kind == "tell":
            pair.dialer.send_tell("x", message, data)
            if sum(payload) < 150:
                small_tells.append((message, sum(payload)))
        elif kind == "ask":
            into = [memoryview(bytearray(size)) for size in payload] if use_sinks else None
            expected[pair.dialer.send_ask("x", message, data, into=into)] = message, data
        else:
            expected[pair.dialer.send_stream("x", message, data, window=2)] = message, data
    pair.pump()
    arrived = [event for event in pair.take_events()[1] if isinstance(event, Delivered)]
    assert len(arrived) == len(acts)
    seen = [(event.message, sum(map(len, event.buffers))) for event in arrived if event.kind == "tell"]
    assert [(message, size) for message, size in seen if size < 150] == small_tells
    for event in arrived:
        if event.kind == "ask":
            pair.listener.send_answer(event.id, event.message, event.buffers)
        elif event.kind == "stream":
            pair.listener.send_item(event.id, event.message, event.buffers)
            pair.listener.send_item(event.id, event.message)
            pair.listener.send_end(event.id)
        else:
            pair.listener.take_tell("x")
    pair.pump()
    back = pair.take_events()[0]
    for ask_id, (message, data) in expected.items():
        mine = [event for event in back if getattr(event, "id", None) == ask_id]
        if isinstance(mine[0], Answered):
            assert len(mine) == 1
        else:
            assert [type(event) for event in mine] == [ItemArrived, ItemArrived, StreamEnded]
        first = mine[0]
        assert isinstance(first, Answered | ItemArrived)
        assert first.message == message
        assert [bytes(buffer) for buffer in first.buffers] == data
    assert not any(isinstance(event, Closed | PeerProved) for event in back)
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0


@quickly
@given(acts=acts, sizes=splits, cancelled=st.sets(st.integers(0, 7)), carried=st.integers(0, 20))
def test_cancelling_anything_at_any_time_leaves_nothing(
    acts: list[tuple[str, Message, list[int]]], sizes: list[int], cancelled: set[int], carried: int
) -> None:
    pair = Pair(limits=SMALL, chunk_bytes=512).open()
    asked: list[tuple[str, int]] = []
    for kind, message, payload in acts:
        if kind == "ask":
            asked.append((kind, pair.dialer.send_ask("x", message, filled(payload, 0))))
        elif kind == "stream":
            asked.append((kind, pair.dialer.send_stream("x", message, filled(payload, 0), window=3)))
    open_here: dict[int, str] = {}

    def carry() -> None:
        for event in feed(pair.listener, b"".join(bytes(part) for part in pair.dialer.data_to_send())):
            if isinstance(event, Delivered):
                open_here[event.id] = event.kind
                if event.kind == "ask":
                    pair.listener.send_answer(event.id, event.message, event.buffers)
                elif pair.listener.item_room(event.id) > 0:
                    pair.listener.send_item(event.id, event.message, event.buffers)
        feed(pair.dialer, b"".join(bytes(part) for part in pair.listener.data_to_send()))

    for _ in range(carried):
        carry()
    for index, (_, ask_id) in enumerate(asked):
        if index in cancelled:
            pair.dialer.cancel(ask_id)
    while is_busy(pair):
        carry()
    for ask_id, kind in open_here.items():
        if kind == "stream":
            pair.listener.send_end(ask_id)
    while is_busy(pair):
        carry()
    assert pair.dialer.is_open
    assert pair.listener.is_open
    assert pair.dialer.num_unfinished == pair.listener.num_unfinished == 0
