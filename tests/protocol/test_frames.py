"""Golden frames: the bytes on the wire, written down. A change here is a new protocol version."""

from __future__ import annotations

import struct

import pytest

from protocol import codec
from protocol.connection import Connection
from protocol.frames import (
    DEFAULT_LIMITS,
    FLAG_DEFERRED,
    HEADER,
    PLAIN_KINDS,
    Kind,
    Limits,
    MessageTooLarge,
    ProtocolError,
    check_header,
    check_sizes,
    measure,
)
from protocol.handshake import Side
from protocol.messages import Failed, ReleaseLease
from protocol.writer import FrameWriter
from tests.support.wire import Pair, connection, feed, taken


def hexed(data: bytes) -> str:
    return data.hex(" ")


def sent(writer: FrameWriter) -> bytes:
    return b"".join(bytes(piece) for piece in writer.data_to_send())


def opened_dialer() -> Connection:
    return Pair().open().dialer


def test_header_is_sixteen_little_endian_bytes() -> None:
    assert HEADER.size == 16
    assert hexed(HEADER.pack(Kind.ASK, 1, 2, 0x03040506, 0x0708)) == "0b 01 02 00 06 05 04 03 08 07 00 00 00 00 00 00"


def test_golden_ask() -> None:
    dialer = opened_dialer()
    assert dialer.send_ask("decode", ReleaseLease(7)) == 1
    assert hexed(taken(dialer)) == (
        "0b 00 00 00 0d 00 00 00 01 00 00 00 00 00 00 00 "  # ASK, no flags, no buffers, 13 bytes, id 1
        "93 a6 64 65 63 6f 64 65 93 04 07 c2 00"  # ["decode", [4, 7, false], 0]
    )


def test_golden_tell_with_buffers() -> None:
    dialer = opened_dialer()
    dialer.send_tell("x", ReleaseLease(7), [b"ab", b"", b"c"])
    assert hexed(taken(dialer)) == (
        "0a 00 03 00 08 00 00 00 01 00 00 00 00 00 00 00 "  # TELL, 3 buffers, 8 bytes, id 1
        "02 00 00 00 00 00 00 00 01 00 00 00 "  # their sizes
        "93 a1 78 93 04 07 c2 00 "  # ["x", [4, 7, false], 0]
        "61 62 63"
    )


def test_golden_answer_stream_item_end_credit_cancel() -> None:
    pair = Pair().open()
    ask_id = pair.dialer.send_ask("x", ReleaseLease(1))
    stream_id = pair.dialer.send_stream("x", ReleaseLease(2), window=2)
    assert hexed(taken(pair.dialer)[24:]) == "0d 00 00 00 08 00 00 00 03 00 00 00 00 00 00 00 93 a1 78 93 04 02 c2 02"
    pair.dialer.send_ask("x", ReleaseLease(3))
    pair = Pair().open()
    pair.dialer.send_ask("x", ReleaseLease(1))
    pair.dialer.send_stream("x", ReleaseLease(2), window=2)
    pair.pump()
    pair.listener.send_answer(ask_id, ReleaseLease(9))
    assert hexed(taken(pair.listener)) == "0c 00 00 00 04 00 00 00 01 00 00 00 00 00 00 00 93 04 09 c2"
    pair.listener.send_item(stream_id, ReleaseLease(8))
    item = taken(pair.listener)
    assert hexed(item) == "0e 00 00 00 04 00 00 00 03 00 00 00 00 00 00 00 93 04 08 c2"
    feed(pair.dialer, item)
    pair.dialer.take_item(stream_id)
    assert hexed(taken(pair.dialer)) == "11 00 00 00 03 00 00 00 03 00 00 00 00 00 00 00 92 a0 01"
    pair.listener.send_end(stream_id, Failed("c", "m", True))
    assert hexed(taken(pair.listener)) == "0f 00 00 00 07 00 00 00 03 00 00 00 00 00 00 00 94 29 a1 63 a1 6d c3"
    pair.dialer.cancel(stream_id)
    assert hexed(taken(pair.dialer)) == "10 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00"


def test_golden_hello_and_proof() -> None:
    pair = Pair()
    hello = taken(pair.dialer)
    assert hexed(hello[:16]) == "01 00 00 00 53 00 00 00 02 00 00 00 00 44 50 45"  # id: "EPD" and version 2
    assert hexed(hello[16:]) == (
        "93 a6 64 69 61 6c 65 72 "  # "dialer"
        "94 a1 61 01 91 a6 64 65 63 6f 64 65 "  # worker "a", instance 1, roles ["decode"]
        "95 a1 61 a9 31 32 37 2e 30 2e 30 2e 31 cd 1b 58 a2 40 61 a9 74 68 69 73 20 68 6f 73 74 "  # endpoint
        "c4 20 61" + " 2d" * 31  # nonce
    )
    feed(pair.listener, hello)
    feed(pair.dialer, taken(pair.listener))
    assert hexed(taken(pair.dialer)) == (  # HMAC-SHA256 over both HELLO bodies
        "02 00 00 00 20 00 00 00 00 00 00 00 00 00 00 00 "
        "10 c0 87 61 23 20 51 3f 75 c3 86 40 af 81 7a e6 "
        "4c fb 5d 78 1c 5b e5 6f 34 82 ba c4 9e 5b 0f 93"
    )


def test_golden_goodbye_and_heartbeat() -> None:
    dialer = opened_dialer()
    dialer.tick()
    assert hexed(taken(dialer)) == "04 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00"
    dialer.close("x", "yz")
    assert hexed(taken(dialer)) == "03 00 00 00 06 00 00 00 00 00 00 00 00 00 00 00 92 a1 78 a2 79 7a"


def test_golden_large_message_travels_in_chunks() -> None:
    writer = FrameWriter(DEFAULT_LIMITS, chunk_bytes=65536)
    payload = bytes(range(256)) * 257  # 65,792 bytes
    writer.send(Kind.ANSWER, 5, b"\x92\x04\x09", [payload])
    announced = sent(writer)
    assert hexed(announced[:36]) == (
        "0c 01 01 00 03 00 00 00 05 00 00 00 00 00 00 00 00 01 01 00 "  # ANSWER, deferred, one buffer of 0x10100 bytes
        "14 00 00 00 00 00 01 00 05 00 00 00 00 00 00 00"  # DATA of 0x10000 bytes for id 5
    )
    assert announced[36:] == b"\x92\x04\x09" + payload[: 65536 - 3]
    rest = sent(writer)
    assert hexed(rest[:16]) == "14 00 00 00 03 01 00 00 05 00 00 00 00 00 00 00"
    assert rest[16:] == payload[65536 - 3 :]
    assert sent(writer) == b""


def test_payload_buffers_pass_through_uncopied() -> None:
    writer = FrameWriter(DEFAULT_LIMITS, chunk_bytes=65536)
    small, large = bytearray(b"small"), bytearray(200_000)
    writer.send(Kind.ANSWER, 1, b"\x01", [small])
    writer.send(Kind.ANSWER, 3, b"\x01", [memoryview(large)])
    pieces = writer.data_to_send()
    small[:] = b"SMALL"
    large[:] = b"\x07" * len(large)
    wire = b"".join(bytes(piece) for piece in pieces)
    assert b"SMALL" in wire
    assert wire.endswith(b"\x07" * 65535)


def test_small_frames_pass_between_chunks_and_large_messages_take_turns() -> None:
    writer = FrameWriter(DEFAULT_LIMITS, chunk_bytes=65536)
    for frame_id in (1, 3):
        writer.send(Kind.ANSWER, frame_id, b"", [bytes(4 * 65536)])
    order: list[int] = []
    for turn in range(8):
        if turn == 3:
            writer.send(Kind.ANSWER, 99, b"\x01")
        wire = sent(writer)
        while wire:
            _, flags, num_buffers, body_bytes, frame_id = HEADER.unpack_from(wire)
            order.append(frame_id)
            wire = wire[16 + 4 * num_buffers + (0 if flags else body_bytes) :]
    assert order == [1, 3, 1, 3, 1, 99, 3, 1, 3, 1, 3]


def test_messages_of_one_id_keep_their_order() -> None:
    writer = FrameWriter(DEFAULT_LIMITS, chunk_bytes=65536)
    writer.send(Kind.ITEM, 1, b"", [bytes(100_000)])
    writer.send(Kind.ITEM, 1, b"\x01")
    writer.send(Kind.ITEM, 1, b"", [bytes(100_000)])
    writer.send(Kind.END, 1, b"")
    kinds: list[tuple[int, int]] = []
    while wire := sent(writer):
        while wire:
            kind, flags, num_buffers, body_bytes, _ = HEADER.unpack_from(wire)
            kinds.append((kind, flags))
            wire = wire[16 + 4 * num_buffers + (0 if flags else body_bytes) :]
    deferred, data = (Kind.ITEM, FLAG_DEFERRED), (Kind.DATA, 0)
    assert kinds == [deferred, data, data, (Kind.ITEM, 0), deferred, data, data, (Kind.END, 0)]


def test_memory_of_any_shape_is_sent_as_its_bytes() -> None:
    numbers = struct.pack("<6i", *range(6))
    shaped = memoryview(numbers).cast("i", (2, 3))
    writer = FrameWriter(DEFAULT_LIMITS, chunk_bytes=65536)
    writer.send(Kind.ANSWER, 1, b"\x01", [shaped])
    assert sent(writer)[16:20] == struct.pack("<I", 24)
    writer.send(Kind.ANSWER, 1, b"\x01", [memoryview(bytes(400_000)).cast("i", (100, 1000)), shaped])
    total = 0
    while wire := sent(writer):
        total += len(wire)
    assert total > 400_024


@pytest.mark.parametrize(
    ("kind", "flags", "num_buffers", "body_bytes"),
    [
        (0, 0, 0, 0),
        (255, 0, 0, 0),
        (9, 0, 0, 0),
        (Kind.ASK, 2, 0, 5),
        (Kind.ASK, 3, 0, 5),
        (Kind.PING, FLAG_DEFERRED, 0, 0),
        (Kind.PING, 0, 1, 0),
        (Kind.PING, 0, 0, 1),
        (Kind.CREDIT, 0, 1, 3),
        (Kind.END, 0, 1, 3),
        (Kind.HELLO, 0, 0, DEFAULT_LIMITS.max_handshake_bytes + 1),
        (Kind.ASK, 0, DEFAULT_LIMITS.max_buffers + 1, 5),
        (Kind.ASK, FLAG_DEFERRED, 0, DEFAULT_LIMITS.max_body_bytes + 1),
    ],
)
def test_impossible_headers_are_refused(kind: int, flags: int, num_buffers: int, body_bytes: int) -> None:
    with pytest.raises(ProtocolError):
        check_header(kind, flags, num_buffers, body_bytes, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    ("flags", "body_bytes", "sizes"),
    [
        (0, DEFAULT_LIMITS.max_inline_bytes + 1, ()),
        (0, 1, (DEFAULT_LIMITS.max_inline_bytes,)),
        (FLAG_DEFERRED, 5, ()),
        (FLAG_DEFERRED, DEFAULT_LIMITS.max_inline_bytes, ()),
        (FLAG_DEFERRED, 0, (2**32 - 1,)),
        (FLAG_DEFERRED, 0, (2**29, 2**29, 1)),
    ],
)
def test_impossible_sizes_are_refused(flags: int, body_bytes: int, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        check_sizes(flags, body_bytes, sizes, DEFAULT_LIMITS)


def test_every_plain_kind_passes_the_full_checks() -> None:
    for kind in PLAIN_KINDS:
        check_header(kind, 0, 0, DEFAULT_LIMITS.max_inline_bytes, DEFAULT_LIMITS)
        assert check_sizes(0, DEFAULT_LIMITS.max_inline_bytes, (), DEFAULT_LIMITS) == DEFAULT_LIMITS.max_inline_bytes


def test_too_much_is_refused_before_any_of_it_is_sent() -> None:
    limits = Limits(max_body_bytes=100, max_buffers=2, max_buffer_bytes=1000, max_message_bytes=1500)
    for body, buffers in [
        (b"x" * 101, []),
        (b"", [b"", b"", b""]),
        (b"", [bytes(1001)]),
        (b"x", [bytes(1000), bytes(500)]),
    ]:
        with pytest.raises(MessageTooLarge):
            measure(body, buffers, limits)
    dialer = Pair(limits=limits).open().dialer
    with pytest.raises(MessageTooLarge):
        dialer.send_ask("x", ReleaseLease(1), [b""] * 3)
    assert taken(dialer) == b""
    assert dialer.num_unfinished == 0
    assert dialer.send_ask("x", ReleaseLease(1)) == 1  # the id was not used up


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92\x04",  # cut off
        codec.encode([4, "seven"]),  # wrong type
        codec.encode([250, 1]),  # unknown message
        codec.encode([4]),  # field missing
        codec.encode({"lease_id": 4}),
        b"\x91" * 100_000,
        b"\x92\xa1\xff\x01",  # not UTF-8
        codec.encode(ReleaseLease(2**63)) + b"trailing",
    ],
)
def test_a_body_that_is_no_message_is_the_one_error(body: bytes) -> None:
    for decode in (codec.decode_message, codec.decode_envelope, codec.decode_credit, codec.decode_goodbye, codec.decode_failed):
        with pytest.raises(codec.UNREADABLE):
            decode(body)


def test_fields_that_a_newer_peer_appends_are_ignored() -> None:
    assert codec.decode_message(codec.encode([4, 7, False, "new", {"more": 1}])) == ReleaseLease(7)
    assert connection(Side.DIALER, "a").peer is None
