"""Message bodies: msgspec structs <-> msgpack bytes, typed by the one union of all messages.

A body that is not one of them is a ProtocolError, whatever is wrong with it.
"""

from __future__ import annotations

from functools import partial
from typing import Final, TypeVar

import msgspec

from protocol.frames import ProtocolError
from protocol.messages import AnyMessage, Failed, Message, Part

_T = TypeVar("_T")


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


def decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview) -> _T:
    """What the decoder makes of a body; one error whatever is wrong with it."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise ProtocolError("bad_message", str(error)) from None


_message_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(AnyMessage)
_envelope_decoder: Final = msgspec.msgpack.Decoder(Envelope)
_credit_decoder: Final = msgspec.msgpack.Decoder(Credit)
_goodbye_decoder: Final = msgspec.msgpack.Decoder(Goodbye)
_failed_decoder: Final = msgspec.msgpack.Decoder(Failed)


def encode_envelope(actor: str, message: Message, window: int = 0) -> bytes:
    return encode(Envelope(actor, message, window))  # type: ignore[arg-type]  # the union is checked where it is read


decode_message: Final = partial(decode, _message_decoder)
decode_envelope: Final = partial(decode, _envelope_decoder)
decode_credit: Final = partial(decode, _credit_decoder)
decode_goodbye: Final = partial(decode, _goodbye_decoder)
decode_failed: Final = partial(decode, _failed_decoder)
