"""Server-sent events over one HTTP response: what keeps it open, what ends it."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Any, TypeVar

from aiohttp import web

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
_MAX_GATHERED_BYTES = 64 * 2**10

T = TypeVar("T")


class EventStream:
    """An open stream of events. While nothing is sent, comments keep proxies and clients from giving up.

    A context manager: entering sends the headers, leaving without an exception ends the response.
    """

    def __init__(self, request: web.Request, *, keep_alive_s: float) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._gathered = b""
        self._is_quiet = True  # nothing was sent since the keeper last looked
        self._is_flushing = False
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        await self.response.prepare(self._request)
        self._keeper = asyncio.create_task(self._keep_open(), name="sse keep-alive")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if error is None:
            await self.flush()
            await self.response.write_eof()

    def add(self, events: bytes) -> None:
        """Add one or more whole events; they leave with the next flush."""
        self._gathered += events

    @property
    def is_full(self) -> bool:
        """Whether so much has gathered that it should be flushed even if more could be had at once."""
        return len(self._gathered) > _MAX_GATHERED_BYTES

    async def flush(self) -> None:
        """Let everything go in one write; waits only while the client reads too slowly."""
        if self._gathered:
            gathered, self._gathered = self._gathered, b""
            self._is_quiet = False
            self._is_flushing = True
            await self.response.write(gathered)
            self._is_flushing = False

    @types.coroutine
    def next_of(self, source: AsyncGenerator[T, None]) -> Generator[Any, None, T]:
        """The source's next item; flushes first if that means waiting, so that items that are there at once share a write.

        Raises StopAsyncIteration at the end of the source, and whatever it or the flush raises.
        """
        # `yield from source.__anext__()`, taken apart to see its first yield: that is where it would wait.
        step = source.__anext__()
        try:
            waiting = step.send(None)
        except StopIteration as ready:
            item: T = ready.value
            return item
        error: BaseException | None = None
        try:
            yield from self.flush().__await__()
        except BaseException as raised:  # also cancellation: it is the source's to hear of
            error = raised
        try:
            while True:
                if error is None:
                    try:
                        yield waiting
                    except BaseException as raised:
                        error = raised
                    else:
                        waiting = step.send(None)
                        continue
                thrown, error = error, None
                waiting = step.throw(thrown)
        except StopIteration as ready:
            item = ready.value
            return item

    async def _keep_open(self) -> None:
        while True:
            await asyncio.sleep(self._keep_alive_s)
            # Bytes that wait to be read keep it open as well, and whether they become fewer tells whether anybody reads.
            if self._is_quiet and not self._is_flushing:
                try:
                    await self.response.write(COMMENT)
                except ConnectionError:
                    return  # the client has gone; the handler is told by its own cancellation
            self._is_quiet = True
