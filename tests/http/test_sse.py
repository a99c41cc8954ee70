from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from epd.http.sse import EventStream


class Response:
    """Takes the place of the response: remembers each write, and may block or fail in it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.blocked = asyncio.Event()
        self.error: Exception | None = None

    async def write(self, data: bytes) -> None:
        self.writes.append(data)
        if self.error is not None:
            raise self.error
        if not self.room.is_set():
            self.blocked.set()
            await self.room.wait()


@pytest.fixture
def response() -> Response:
    return Response()


@pytest.fixture
def events(response: Response) -> EventStream:
    stream = EventStream(make_mocked_request("GET", "/"), keep_alive_s=1000.0)
    stream.response = cast(web.StreamResponse, response)
    return stream


class Source:
    """Items that are there at once, and one that is waited for after each `...`."""

    def __init__(self, items: list[Any]) -> None:
        self.waits = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended: BaseException | str | None = None
        self.items = self._run(items)

    async def _run(self, items: list[Any]) -> AsyncGenerator[bytes, None]:
        try:
            for item in items:
                if item is ...:
                    self.waits.set()
                    await self.go_on.wait()
                    self.go_on.clear()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
            self.ended = "at the end"
        except BaseException as error:
            self.ended = error
            raise


def reader(events: EventStream, source: Source) -> Callable[[], Any]:
    async def read() -> None:
        while True:
            events.add(await events.next_of(source.items))

    return read


async def test_items_that_are_there_at_once_share_a_write(events: EventStream, response: Response) -> None:
    source = Source([b"a", b"b", ..., b"c", b"d", b"e", ...])
    reading = asyncio.create_task(reader(events, source)())
    await source.waits.wait()
    await asyncio.sleep(0)
    assert response.writes == [b"ab"]
    source.waits.clear()
    source.go_on.set()
    await source.waits.wait()
    assert response.writes == [b"ab", b"cde"]
    source.go_on.set()
    with pytest.raises(StopAsyncIteration):
        await reading
    assert source.ended == "at the end"


async def test_nothing_is_written_when_nothing_was_added(events: EventStream, response: Response) -> None:
    source = Source([..., b"a"])
    source.go_on.set()
    assert await events.next_of(source.items) == b"a"
    assert response.writes == []


async def test_an_error_of_the_source_comes_through(events: EventStream) -> None:
    for items in ([ValueError("x")], [..., ValueError("x")]):
        source = Source(items)
        source.go_on.set()
        with pytest.raises(ValueError, match="x"):
            await events.next_of(source.items)


async def test_cancelling_reaches_a_source_that_waits(events: EventStream) -> None:
    source = Source([b"a", ..., b"b"])
    reading = asyncio.create_task(reader(events, source)())
    await source.waits.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert isinstance(source.ended, asyncio.CancelledError)


async def test_cancelling_reaches_the_source_while_a_write_waits(events: EventStream, response: Response) -> None:
    response.room.clear()
    source = Source([b"a", ..., b"b"])
    reading = asyncio.create_task(reader(events, source)())
    await response.blocked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert isinstance(source.ended, asyncio.CancelledError)
    await source.items.aclose()


async def test_a_source_that_was_ready_while_a_write_waited_goes_on(events: EventStream, response: Response) -> None:
    response.room.clear()
    source = Source([b"a", ..., b"b", ...])
    reading = asyncio.create_task(reader(events, source)())
    await response.blocked.wait()
    source.waits.clear()
    source.go_on.set()
    response.room.set()
    await source.waits.wait()
    assert response.writes == [b"a", b"b"]
    reading.cancel()


async def test_a_client_that_is_gone_ends_the_source(events: EventStream, response: Response) -> None:
    response.error = ConnectionResetError("gone")
    source = Source([b"a", ..., b"b"])
    with pytest.raises(ConnectionResetError):
        await reader(events, source)()
    assert isinstance(source.ended, ConnectionResetError)


async def test_much_is_said_to_be_full(events: EventStream, response: Response) -> None:
    seen = []
    for step in (b"x" * 2**16, b"x"):
        events.add(step)
        seen.append(events.is_full)
    await events.flush()
    seen.append(events.is_full)
    await events.flush()
    assert seen == [False, True, False]
    assert len(response.writes) == 1
