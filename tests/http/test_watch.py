"""Who is idle or reads nothing is closed, and nobody else; over real sockets the answer that nobody read ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable

import aiohttp
import pytest

from epd.http.watch import ConnectionWatch
from epd.request import Delta, GenerateRequest
from tests.http.conftest import Start
from tests.support.clock import FakeClock
from tests.support.engine import MODEL, ScriptedEngine, Step


class Wire:
    def __init__(self) -> None:
        self.num_unread = 0
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def abort(self) -> None:
        self.is_aborted = True


class Client:
    def __init__(self) -> None:
        self.transport: Wire | None = Wire()

    @property
    def wire(self) -> Wire:
        assert self.transport is not None
        return self.transport


class Room:
    """A watch over some clients, at a time of the test's own."""

    def __init__(self, num_clients: int = 1) -> None:
        self.clients = [Client() for _ in range(num_clients)]
        self.clock = FakeClock()
        self.watch = ConnectionWatch(lambda: list(self.clients), idle_s=60.0, stalled_s=30.0, clock=self.clock)

    def look_after(self, *seconds: float) -> None:
        for each in seconds:
            self.clock.advance(each)
            self.watch.look()

    def aborted(self) -> list[bool]:
        return [client.wire.is_aborted for client in self.clients]


def test_a_connection_without_a_request_is_closed_in_the_end() -> None:
    room = Room(3)
    room.look_after(0)
    room.watch.began(room.clients[1])
    room.look_after(50)
    room.watch.began(room.clients[2])
    room.watch.ended(room.clients[2])
    room.look_after(20)
    assert room.aborted() == [True, False, False]
    room.look_after(45)
    assert room.aborted() == [True, False, True]
    room.watch.ended(room.clients[1])
    room.look_after(50)
    assert room.aborted()[1] is False
    room.look_after(10)
    assert room.aborted()[1] is True


@pytest.mark.parametrize(
    ("unread", "is_aborted"),
    [
        ([5, 5, 5, 5], True),
        ([5, 4, 4, 4], False),  # it read something but thirty seconds ago
        ([5, 4, 4, 4, 4], True),
        ([5, 6, 5, 6, 5, 6], False),  # it reads, and more is written
        ([0, 0, 0, 0, 0], False),
        ([5, 0, 5, 5, 5], False),
    ],
)
def test_a_client_that_reads_nothing_is_closed(unread: Iterable[int], is_aborted: bool) -> None:
    room = Room()
    room.watch.began(room.clients[0])
    for size in unread:
        room.clients[0].wire.num_unread = size
        room.look_after(10)
    assert room.aborted() == [is_aborted]


def test_a_slow_reader_of_a_whole_answer_is_not_idle() -> None:
    room = Room()
    room.watch.began(room.clients[0])
    room.watch.ended(room.clients[0])
    for size in range(20, 0, -1):
        room.clients[0].wire.num_unread = size
        room.look_after(10)
    assert room.aborted() == [False]


def test_what_has_gone_is_forgotten() -> None:
    room = Room(2)
    room.look_after(1)
    room.clients[0].transport = None
    room.look_after(1)
    del room.clients[0]
    room.look_after(1)
    assert len(room.watch._seen) == 1


# --- over sockets ---------------------------------------------------------------------------------------------------


def endless(request: GenerateRequest) -> list[Step]:
    return [Delta(0, "x" * 4096, 1) for _ in range(20_000)]


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.setblocking(False)
    return client


async def test_an_answer_that_nobody_reads_ends(start: Start) -> None:
    engine = ScriptedEngine(endless)
    server = await start(engine, server={"stalled_s": 0.3, "keep_alive_s": 0.05})
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    with connected(server.url) as client:
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        await asyncio.get_running_loop().sock_sendall(client, "\r\n".join((*head, "", body)).encode())
        async with asyncio.timeout(30):
            await engine.all_closed()
    assert engine.num_deltas < 20_000


async def test_half_a_request_is_not_waited_for(start: Start) -> None:
    server = await start(ScriptedEngine(), server={"idle_s": 0.3})
    loop = asyncio.get_running_loop()
    with connected(server.url) as client:
        await loop.sock_sendall(client, b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
        async with asyncio.timeout(30):
            try:
                assert await loop.sock_recv(client, 100) == b""
            except ConnectionResetError:
                pass
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as response:
        assert response.status == 200
