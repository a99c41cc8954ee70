"""How two workers prove to each other that they hold the cluster's token, and what they say about themselves.

The dialer says HELLO, the listener answers HELLO, the dialer proves itself first, then the listener. A proof is an HMAC-SHA256
under the token over the side that proves and both HELLO bodies, so it binds both nonces, worker ids, instances, roles and
endpoints, and can neither be replayed on another link nor reflected on this one.

Knows no random source (nonces are given) and no link states (connection.py has them).
"""

from __future__ import annotations

import hashlib
import hmac
from enum import Enum

import msgspec

from protocol.codec import encode
from protocol.frames import HELLO_MAGIC, VERSION, ProtocolError
from protocol.messages import Endpoint, Part, WorkerId

NONCE_BYTES = 32
PROOF_BYTES = 32


class Side(Enum):
    """The role of one end of a connection."""

    DIALER = "dialer"
    LISTENER = "listener"

    @property
    def other(self) -> Side:
        return Side.LISTENER if self is Side.DIALER else Side.DIALER


class Identity(Part, frozen=True):
    """What a worker says about itself. `instance` is drawn when the process starts and tells a restart from a reconnect."""

    worker: WorkerId
    instance: int
    roles: tuple[str, ...]
    endpoint: Endpoint


class Hello(Part, frozen=True):
    side: str
    identity: Identity
    nonce: bytes


_decode_hello = msgspec.msgpack.Decoder(Hello).decode


def hello_body(side: Side, identity: Identity, nonce: bytes) -> bytes:
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
    return encode(Hello(side=side.value, identity=identity, nonce=nonce))


def hello_id(version: int = VERSION) -> int:
    return HELLO_MAGIC | version


def read_hello(frame_id: int, body: bytes | memoryview, *, own: Side, identity: Identity, expected: WorkerId | None) -> Identity:
    """The peer's identity, if this end can talk to it at all. The version is looked at before the body is.

    Raises ProtocolError, or UNREADABLE as any decoder.
    """
    if frame_id & ~0xFFFFFFFF != HELLO_MAGIC:
        raise ProtocolError("bad_frame", "this is no epd peer")
    version = frame_id & 0xFFFFFFFF
    if version != VERSION:
        raise ProtocolError("wrong_version", f"this end speaks protocol version {VERSION}, the other {version}")
    hello = _decode_hello(body)
    peer = hello.identity
    if hello.side != own.other.value or len(hello.nonce) != NONCE_BYTES:
        raise ProtocolError("bad_frame", f"HELLO of a {hello.side!r} with a nonce of {len(hello.nonce)} bytes")
    if not peer.worker or peer.endpoint.worker != peer.worker:
        raise ProtocolError("bad_frame", f"worker {peer.worker!r} announces the endpoint of {peer.endpoint.worker!r}")
    if peer.worker == identity.worker:
        raise ProtocolError("same_worker", f"both ends say they are worker {peer.worker!r}")
    if expected is not None and peer.worker != expected:
        raise ProtocolError("wrong_worker", f"worker {expected!r} was dialled, {peer.worker!r} answered")
    return peer


def proof(token: bytes, side: Side, dialer_hello: bytes, listener_hello: bytes) -> bytes:
    """What `side` shows the other end."""
    transcript = hashlib.sha256(dialer_hello).digest() + hashlib.sha256(listener_hello).digest()
    return hmac.digest(token, b"epd proof " + side.value.encode() + b" " + transcript, "sha256")


def check_proof(token: bytes, side: Side, dialer_hello: bytes, listener_hello: bytes, shown: bytes | memoryview) -> None:
    if not hmac.compare_digest(proof(token, side, dialer_hello, listener_hello), bytes(shown)):
        raise ProtocolError("wrong_token", "the ends do not hold the same cluster token")
