"""What a Connection reports: one type per thing that can happen on a link.

Buffers of an event belong to whoever takes it. Messages are decoded and typed.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from protocol.handshake import Identity
from protocol.messages import Failed, Message

Buffers: TypeAlias = tuple[memoryview | bytes, ...]


class PeerProved(msgspec.Struct, frozen=True):
    """To a listener: the dialer holds the token. Call accept() or refuse()."""

    peer: Identity


class Opened(msgspec.Struct, frozen=True):
    """The link can be used; both ends have proved themselves."""

    peer: Identity


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """A tell, an ask or a stream's opening for one of this end's actors. An ask or a stream is answered under `id`."""

    kind: Literal["tell", "ask", "stream"]
    id: int
    actor: str
    message: Message
    buffers: Buffers


class Answered(msgspec.Struct, frozen=True, gc=False):
    """The one answer to this end's ask. `mismatched`: its buffers did not fit the registered views and were forgotten."""

    id: int
    message: Message
    buffers: Buffers
    mismatched: bool = False


class ItemArrived(msgspec.Struct, frozen=True, gc=False):
    id: int
    message: Message
    buffers: Buffers


class StreamEnded(msgspec.Struct, frozen=True, gc=False):
    """No more items; `failed` says why if it ended badly."""

    id: int
    failed: Failed | None


class Cancelled(msgspec.Struct, frozen=True, gc=False):
    """Whoever asked this (ask or stream) does not want it any more."""

    id: int


class TellRoom(msgspec.Struct, frozen=True, gc=False):
    """There is room again for tells to this actor of the other end."""

    actor: str


class ItemRoom(msgspec.Struct, frozen=True, gc=False):
    """There is room again for items of this stream."""

    id: int


class Closed(msgspec.Struct, frozen=True):
    """The connection is over: close the socket once data_to_send() is empty. `by_peer`: the other end said so."""

    code: str
    reason: str
    by_peer: bool


Event: TypeAlias = (
    PeerProved | Opened | Delivered | Answered | ItemArrived | StreamEnded | Cancelled | TellRoom | ItemRoom | Closed
)
