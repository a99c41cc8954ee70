"""Clients that neither send nor read: their connections are closed, so that what waits for them does not wait for ever.

A connection may be without a request for a while (kept alive, or with half a request sent), and a client may read slowly; one
that takes nothing at all, with bytes waiting for it, has gone in all but name. aiohttp bounds neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from epd.clock import monotonic
from epd.log import Log

IDLE_S = 75.0  # without a request; longer than proxies keep their connections
STALLED_S = 30.0  # without reading anything
_log = Log("http")


class Wire(Protocol):
    """What is asked of a transport."""

    def get_write_buffer_size(self) -> int: ...

    def abort(self) -> None: ...


class Connection(Protocol):
    """One client's, as aiohttp's server lists it."""

    @property
    def transport(self) -> Wire | None: ...


@dataclass(slots=True)
class _Seen:
    """Of a connection, when it was last looked at."""

    idle_since: float
    num_requests: int = 0  # that are running
    num_unread: int = 0  # bytes
    unread_since: float = 0.0


class ConnectionWatch:
    """Looks at all connections now and then. `connections` lists them."""

    def __init__(
        self,
        connections: Callable[[], Iterable[Connection]],
        *,
        idle_s: float = IDLE_S,
        stalled_s: float = STALLED_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._connections = connections
        self._idle_s = idle_s
        self._stalled_s = stalled_s
        self._clock = clock
        self._seen: dict[Connection, _Seen] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_looking(), name="connection watch")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def began(self, connection: Connection) -> None:
        """A request of it is running."""
        self._seen.setdefault(connection, _Seen(self._clock())).num_requests += 1

    def ended(self, connection: Connection) -> None:
        seen = self._seen.setdefault(connection, _Seen(self._clock(), num_requests=1))
        seen.num_requests -= 1
        seen.idle_since = self._clock()

    def look(self) -> None:
        """Close what has been idle, or stalled, for too long."""
        now = self._clock()
        known, self._seen = self._seen, {}
        for connection in self._connections():
            seen = self._seen[connection] = known.get(connection) or _Seen(now)
            wire = connection.transport
            if wire is None:
                continue
            num_unread = wire.get_write_buffer_size()
            if num_unread != seen.num_unread or not num_unread:
                seen.num_unread, seen.unread_since = num_unread, now
            if num_unread:
                if now - seen.unread_since >= self._stalled_s:
                    _log.info("a client reads nothing: its connection is closed", unread_bytes=num_unread)
                    wire.abort()
            elif not seen.num_requests and now - seen.idle_since >= self._idle_s:
                wire.abort()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle_s, self._stalled_s) / 3)
            self.look()
