"""Server-sent events over one HTTP response: what keeps it open, what ends it."""

from __future__ import annotations

import asyncio
from types import TracebackType

from aiohttp import web

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class EventStream:
    """An open stream of events. While nothing is sent, comments keep proxies and clients from giving up.

    A context manager: entering sends the headers, leaving without an exception ends the response. Several events that are sent
    before the event loop goes on leave in one system call, since the transport writes once per turn (uvloop) and nothing here
    waits unless the client reads too slowly.
    """

    def __init__(self, request: web.Request, *, keep_alive_s: float) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._sent = 0.0
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        await self._response.prepare(self._request)
        self._loop = asyncio.get_running_loop()
        self._keeper = asyncio.create_task(self._keep_open(), name="sse keep-alive")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if error is None:
            await self._response.write_eof()

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    async def send(self, events: bytes) -> None:
        """Send one or more whole events; waits only while the client reads too slowly."""
        self._sent = self._loop.time()
        await self._response.write(events)

    async def _keep_open(self) -> None:
        while True:
            await asyncio.sleep(self._keep_alive_s)
            if self._loop.time() - self._sent >= self._keep_alive_s:
                try:
                    await self._response.write(_KEEP_ALIVE)
                except ConnectionError:
                    return  # the client has gone; the handler is told by its own cancellation
