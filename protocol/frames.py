"""The shape of a frame: header, limits, and the checks that come before anything is read or allocated.

Knows bytes and sizes. Does not know what a message means, which frames may come when, or sockets.

    0      1       2             4             8                16
    | kind | flags | num_buffers | body_bytes  | id             | num_buffers x u32 | body | buffers ... |

All little endian. A message whose body and buffers do not fit into `max_inline_bytes` is deferred: its frame carries only the
sizes, and the bytes follow in DATA frames of the same id, between which other frames may travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, pack, unpack_from
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

VERSION = 2
HELLO_MAGIC = 0x45504400 << 32  # "EPD": upper half of a HELLO's id; the lower half is the version
HEADER = Struct("<BBHIQ")
HEADER_BYTES = HEADER.size
FLAG_DEFERRED = 1


class Kind(IntEnum):
    HELLO = 1
    PROOF = 2
    GOODBYE = 3
    PING = 4
    PONG = 5
    TELL = 10
    ASK = 11
    ANSWER = 12
    STREAM = 13
    ITEM = 14
    END = 15
    CANCEL = 16
    CREDIT = 17
    DATA = 20
    ABANDON = 21


DEFERRABLE = frozenset({Kind.TELL, Kind.ASK, Kind.ANSWER, Kind.STREAM, Kind.ITEM, Kind.END})
"""Kinds that carry a message, so that their bytes may follow in DATA frames."""

WITH_BUFFERS = DEFERRABLE - {Kind.END}
_HANDSHAKE = frozenset({Kind.HELLO, Kind.PROOF, Kind.GOODBYE})
_BODILESS = frozenset({Kind.PING, Kind.PONG, Kind.CANCEL, Kind.ABANDON})

# What a header of this kind may show: 0 unknown, else a mask.
_KNOWN, _MAY_HAVE_BODY, _MAY_HAVE_BUFFERS, _MAY_DEFER, _IS_HANDSHAKE = 1, 2, 4, 8, 16
_RULES = [0] * 256
for _kind in Kind:
    _RULES[_kind] = (
        _KNOWN
        | (_MAY_HAVE_BODY if _kind not in _BODILESS else 0)
        | (_MAY_HAVE_BUFFERS if _kind in WITH_BUFFERS else 0)
        | (_MAY_DEFER if _kind in DEFERRABLE else 0)
        | (_IS_HANDSHAKE if _kind in _HANDSHAKE else 0)
    )


PLAIN_KINDS = frozenset(int(kind) for kind in DEFERRABLE | {Kind.CREDIT})
"""Kinds whose frame needs no check beyond its size when it has neither flags nor buffers."""


class ProtocolError(Exception):
    """The other end broke the protocol or was refused. The link is closed with `code`; nothing else is touched."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class MessageTooLarge(ValueError):
    """This end tried to send more than the limits allow; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Part of the protocol version: both ends hold each other to the same numbers."""

    max_handshake_bytes: int = 4096  # body of HELLO, PROOF, GOODBYE
    max_inline_bytes: int = 65536  # body and buffers of a frame that is not deferred
    max_body_bytes: int = 8 << 20
    max_buffers: int = 8192
    max_buffer_bytes: int = 1 << 30
    max_message_bytes: int = 1 << 30  # body and buffers of one message
    max_chunk_bytes: int = 1 << 20  # one DATA frame
    max_transfers: int = 64  # deferred messages in transit per direction
    max_transit_bytes: int = 2 << 30  # and their bytes
    tell_window: int = 256  # tells to one actor that it has not taken yet
    max_stream_window: int = 4096
    max_open_asks: int = 16384  # asks and streams of one end that are not finished
    max_actors: int = 4096  # actor names that tells of one link may name
    max_backlog_bytes: int = 256 << 20  # small frames that the other end does not read


DEFAULT_LIMITS = Limits()


def check_header(kind: int, flags: int, num_buffers: int, body_bytes: int, limits: Limits) -> None:
    """Raise unless a header of this shape may exist at all. DATA is checked by whoever knows its transfer."""
    rules = _RULES[kind]
    if not rules:
        raise ProtocolError("bad_frame", f"unknown frame kind {kind}")
    if flags and not (flags == FLAG_DEFERRED and rules & _MAY_DEFER):
        raise ProtocolError("bad_frame", f"{Kind(kind).name} with flags {flags:#x}")
    if num_buffers and not rules & _MAY_HAVE_BUFFERS:
        raise ProtocolError("bad_frame", f"{Kind(kind).name} with buffers")
    if body_bytes and not rules & _MAY_HAVE_BODY:
        raise ProtocolError("bad_frame", f"{Kind(kind).name} with a body")
    if num_buffers > limits.max_buffers:
        raise ProtocolError("too_large", f"{num_buffers} buffers, at most {limits.max_buffers}")
    limit = limits.max_handshake_bytes if rules & _IS_HANDSHAKE else limits.max_body_bytes
    if body_bytes > limit and kind != Kind.DATA:
        raise ProtocolError("too_large", f"{Kind(kind).name} body of {body_bytes} bytes, at most {limit}")


def check_sizes(flags: int, body_bytes: int, sizes: Sequence[int], limits: Limits) -> int:
    """Bytes of body and buffers together, if they may come like this."""
    total = body_bytes + sum(sizes) if sizes else body_bytes
    if not flags & FLAG_DEFERRED:
        if total > limits.max_inline_bytes:
            raise ProtocolError("too_large", f"{total} bytes inline, at most {limits.max_inline_bytes}")
        return total
    if total <= limits.max_inline_bytes:
        raise ProtocolError("bad_frame", f"{total} bytes deferred that fit inline")
    if total > limits.max_message_bytes:
        raise ProtocolError("too_large", f"message of {total} bytes, at most {limits.max_message_bytes}")
    if sizes and max(sizes) > limits.max_buffer_bytes:
        raise ProtocolError("too_large", f"buffer of {max(sizes)} bytes, at most {limits.max_buffer_bytes}")
    return total


def measure(body: bytes, buffers: Sequence[Buffer], limits: Limits) -> tuple[list[int], int]:
    """Sizes of the buffers and of everything, or MessageTooLarge, before anything of it is sent."""
    sizes = [len(buffer) if type(buffer) is not memoryview else buffer.nbytes for buffer in buffers]
    total = len(body) + sum(sizes)
    if len(body) > limits.max_body_bytes:
        raise MessageTooLarge(f"message body of {len(body)} bytes, at most {limits.max_body_bytes}")
    if len(sizes) > limits.max_buffers:
        raise MessageTooLarge(f"{len(sizes)} buffers, at most {limits.max_buffers}")
    if total > limits.max_message_bytes or (sizes and max(sizes) > limits.max_buffer_bytes):
        raise MessageTooLarge(f"message of {total} bytes, at most {limits.max_message_bytes}")
    return sizes, total


def pack_sizes(sizes: Sequence[int]) -> bytes:
    return pack(f"<{len(sizes)}I", *sizes)


def unpack_sizes(data: memoryview, offset: int, num_buffers: int) -> tuple[int, ...]:
    return unpack_from(f"<{num_buffers}I", data, offset)
