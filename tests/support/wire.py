"""Two protocol.Connections joined without a socket, byte by byte if a test wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from protocol.connection import Connection, State
from protocol.events import Event, PeerProved
from protocol.frames import DEFAULT_LIMITS, Buffer, Limits
from protocol.handshake import Identity, Side
from protocol.messages import Endpoint, WorkerId

TOKEN = b"a cluster token"


def identity(worker: str, *, instance: int = 1, roles: tuple[str, ...] = ("decode",)) -> Identity:
    name = WorkerId(worker)
    return Identity(name, instance, roles, Endpoint(name, "127.0.0.1", 7000, f"@{worker}", "this host"))


def connection(
    side: Side,
    worker: str,
    *,
    token: bytes = TOKEN,
    nonce: bytes | None = None,
    expected: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    chunk_bytes: int = 1 << 19,
) -> Connection:
    return Connection(
        side=side,
        identity=identity(worker),
        token=token,
        nonce=nonce if nonce is not None else worker.encode().ljust(32, b"-"),
        expected=None if expected is None else WorkerId(expected),
        limits=limits,
        chunk_bytes=chunk_bytes,
    )


def feed(target: Connection, data: Buffer, *, most: int = 1 << 30) -> list[Event]:
    """Give a connection bytes as a socket would, at most `most` at a time."""
    found: list[Event] = []
    rest = memoryview(data).cast("B")
    while rest.nbytes:
        room = target.get_buffer()
        assert room.nbytes, "a reader that has no room would spin"
        count = min(room.nbytes, rest.nbytes, most)
        room[:count] = rest[:count]
        rest = rest[count:]
        found += target.buffer_updated(count)
    return found


def taken(source: Connection) -> bytes:
    """Everything that a connection has to send."""
    out = bytearray()
    while pieces := source.data_to_send():
        for piece in pieces:
            out += piece
    return bytes(out)


class Pair:
    """A dialer and a listener. `pump()` carries bytes both ways until both are quiet, and lets the dialer in."""

    def __init__(
        self, *, limits: Limits = DEFAULT_LIMITS, chunk_bytes: int = 1 << 19, sizes: Callable[[], int] = lambda: 1 << 30
    ) -> None:
        self.dialer = connection(Side.DIALER, "a", limits=limits, chunk_bytes=chunk_bytes)
        self.listener = connection(Side.LISTENER, "b", limits=limits, chunk_bytes=chunk_bytes)
        self.dialer_events: list[Event] = []
        self.listener_events: list[Event] = []
        self._sizes = sizes  # of the pieces in which bytes arrive

    def pump(self) -> None:
        busy = True
        while busy:
            busy = self._carry(self.dialer, self.listener, self.listener_events)
            busy |= self._carry(self.listener, self.dialer, self.dialer_events)

    def open(self) -> Pair:
        self.pump()
        assert self.dialer.state is State.OPEN
        assert self.listener.state is State.OPEN
        self.take_events()
        return self

    def take_events(self) -> tuple[list[Event], list[Event]]:
        """What the dialer and the listener have reported since the last call."""
        found = self.dialer_events, self.listener_events
        self.dialer_events, self.listener_events = [], []
        return found

    def _carry(self, source: Connection, target: Connection, found: list[Event]) -> bool:
        pieces = source.data_to_send()
        for event in _fed(target, pieces, self._sizes):
            found.append(event)
            if isinstance(event, PeerProved):
                found.append(target.accept())
        return bool(pieces)


def _fed(target: Connection, pieces: Iterable[Buffer], sizes: Callable[[], int]) -> list[Event]:
    found: list[Event] = []
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest.nbytes:
            count = max(1, min(sizes(), rest.nbytes))
            found += feed(target, rest[:count])
            rest = rest[count:]
    return found
