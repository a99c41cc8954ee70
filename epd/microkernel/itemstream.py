"""The consumer's end of a stream: items in order, one end, one deadline.

Knows nothing of where items come from: whoever opens it gives three functions, and pushes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from epd.errors import DeadlineExceeded, EpdError
from epd.microkernel.actor import Answer


class Source(Protocol):
    """The producer's side, as the consumer sees it."""

    def took_item(self) -> None:
        """There is room for one more."""

    def left(self) -> None:
        """The consumer wants no more; called at most once, and not after the end."""


class ItemStream(AsyncIterator[Answer]):
    """Iterate it, and `aclose()` it unless it was iterated to its end. Opened by the first `__anext__`.

    Raises the EpdError that ended it; DeadlineExceeded `timeout_s` after it was made, whatever had arrived by then.
    """

    def __init__(self, open_source: Callable[[ItemStream], Awaitable[Source]], *, timeout_s: float) -> None:
        self._open_source: Callable[[ItemStream], Awaitable[Source]] | None = open_source
        self._source: Source | None = None
        self._items: deque[Answer] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_ended = False
        self._error: EpdError | None = None
        self._timeout_s = timeout_s
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._deadline = loop.time() + timeout_s
        self._timer = loop.call_later(timeout_s, self._expire)

    def __aiter__(self) -> ItemStream:
        return self

    async def __anext__(self) -> Answer:
        if self._open_source is not None and not self._is_ended:
            open_source, self._open_source = self._open_source, None
            await self._open(open_source)
        while not self._items:
            if self._is_ended:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._leave()
                raise
        item = self._items.popleft()
        if self._source is not None:
            self._source.took_item()
        return item

    async def aclose(self) -> None:
        """The consumer wants no more. The producer's next item() raises Cancelled."""
        self._leave()
        self._items.clear()
        self._error = None

    @property
    def time_left_s(self) -> float:
        return max(0.0, self._deadline - self._loop.time())

    @property
    def num_items(self) -> int:
        """Arrived and not taken yet."""
        return len(self._items)

    # --- for whoever opened it --------------------------------------------------------------------------------------

    def push(self, item: Answer) -> None:
        if not self._is_ended:
            self._items.append(item)
            self._wake()

    def finish(self, error: EpdError | None) -> None:
        """The producer has ended, or is lost. Items that have arrived are still given out first."""
        if not self._is_ended:
            self._error = error
            self._end()

    # --- helpers ----------------------------------------------------------------------------------------------------

    async def _open(self, open_source: Callable[[ItemStream], Awaitable[Source]]) -> None:
        try:
            source = await open_source(self)
        except EpdError as error:
            self.finish(error)
        except BaseException:
            self._end()
            raise
        else:
            if self._is_ended:
                source.left()  # the deadline passed meanwhile
            else:
                self._source = source

    def _expire(self) -> None:
        self._items.clear()
        self._error = DeadlineExceeded(f"a stream was not finished within {self._timeout_s:g} s")
        self._leave()

    def _leave(self) -> None:
        source = self._source
        if not self._is_ended:
            self._end()
            if source is not None:
                source.left()

    def _end(self) -> None:
        self._is_ended = True
        self._source = None
        self._open_source = None
        self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
