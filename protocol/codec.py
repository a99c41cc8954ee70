"""Message bodies: msgspec structs <-> msgpack bytes, typed by the one union of all messages.

A body that is not one of them makes a decoder raise one of UNREADABLE; the Connection closes the link for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from protocol.messages import AnyMessage, Failed, Message, Part


class Envelope(Part, frozen=True):
    """Body of TELL, ASK and STREAM: whom it is for. `window`: items that a stream's asker has room for."""

    actor: str
    message: AnyMessage
    window: int = 0


class Credit(Part, frozen=True):
    """Body of CREDIT: room for `count` more, of tells to `actor`, or of items of the stream `id` when actor is empty."""

    actor: str
    count: int


class Goodbye(Part, frozen=True):
    """Body of GOODBYE, and the same in every version: why this end closes the link."""

    code: str
    reason: str


_encoder: Final = msgspec.msgpack.Encoder()
encode: Final = _encoder.encode


UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
"""What a decoder raises for a body that is none of its own, whatever is wrong with it."""

decode_message: Final[Callable[[bytes | memoryview], Message]] = msgspec.msgpack.Decoder(AnyMessage).decode
decode_envelope: Final = msgspec.msgpack.Decoder(Envelope).decode
decode_credit: Final = msgspec.msgpack.Decoder(Credit).decode
decode_goodbye: Final = msgspec.msgpack.Decoder(Goodbye).decode
decode_failed: Final = msgspec.msgpack.Decoder(Failed).decode


def encode_envelope(actor: str, message: Message, window: int = 0) -> bytes:
    return encode(Envelope(actor, message, window))  # type: ignore[arg-type]  # the union is checked where it is read
