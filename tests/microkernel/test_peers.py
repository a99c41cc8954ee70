"""Which links there are: dialled on first use, one per pair of workers, replaced when a worker comes back, refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from epd.errors import DeadlineExceeded, Overloaded, PeerLost, Refused
from epd.microkernel.system import System
from protocol.frames import HEADER, Kind
from protocol.handshake import hello_id
from protocol.messages import Address, Endpoint, ReleaseLease, WorkerId
from tests.support.systems import TOKEN, WAIT_S, Echo, Recorder, at, idle, media, running, until

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_address(endpoint: Endpoint, *, worker: str = "", unix_path: str = "") -> Endpoint:
    """The same place under another name, or with another Unix socket."""
    name = WorkerId(worker or endpoint.worker)
    return Endpoint(name, endpoint.host, endpoint.port, unix_path or endpoint.unix_path, endpoint.host_id)


@contextlib.asynccontextmanager
async def tcp_server(handler: Handler) -> AsyncIterator[int]:
    """A listener that is no worker; yields its port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_workers_of_one_host_talk_over_a_unix_socket() -> None:
    async with running("a", "b") as (a, b):
        await a.ask(await b.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)
        assert (media(a), media(b)) == ({"b": "unix"}, {"a": "unix"})


async def test_a_unix_socket_that_is_gone_is_no_obstacle() -> None:
    async with running("a", "b", introduced=False) as (a, b):
        a.introduce(with_address(b.endpoint, unix_path="@epd-no-such-socket"))
        await a.ask(await b.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)
        assert media(a) == {"b": "tcp"}


async def test_whoever_was_dialled_can_ask_back_over_the_same_link() -> None:
    async with running("a", "b", introduced=False) as (a, b):
        a.introduce(b.endpoint)
        await a.ask(await b.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)
        await b.ask(await a.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)
        assert (list(media(a)), list(media(b))) == (["b"], ["a"])


@pytest.mark.parametrize("unix", [True, False])
async def test_workers_that_dial_each_other_at_once_end_with_one_link(unix: bool) -> None:
    names = [f"worker {index}" for index in range(6)]
    async with running(*names, unix=unix) as systems:
        for system in systems:
            await system.register("echo", Echo())
        asks = [
            system.ask(at(other, "echo"), ReleaseLease(1), timeout_s=WAIT_S)
            for _ in range(3)
            for system in systems
            for other in systems
            if other is not system
        ]
        await asyncio.gather(*asks)
        for system in systems:
            assert sorted(media(system)) == sorted(name for name in names if name != system.worker)
            open_links = [link for link in system._live_peers()._links if link.is_open]
            assert len(open_links) == len(systems) - 1


async def test_many_asks_wait_for_one_dial() -> None:
    async with running("a", "b") as (a, b):
        to = await b.register("echo", Echo())
        await asyncio.gather(*(a.ask(to, ReleaseLease(i), timeout_s=WAIT_S) for i in range(50)))
        assert len(b._live_peers()._links) == 1


async def test_discovering_an_address_tells_who_lives_there() -> None:
    async with running("a", "b", introduced=False) as (a, b):
        found = await a.discover(b.endpoint.host, b.endpoint.port, timeout_s=WAIT_S)
        assert found.worker == "b"
        assert found.endpoint == b.endpoint
        await a.ask(await b.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)
        with pytest.raises(Refused, match="both ends"):
            await a.discover(a.endpoint.host, a.endpoint.port, timeout_s=WAIT_S)


async def test_a_wrong_token_is_refused_by_name() -> None:
    async with running("a") as (a,), running("b", token="another") as (b,):
        a.introduce(b.endpoint)
        with pytest.raises(Refused, match="token"):
            await a.ask(at(b, "echo"), ReleaseLease(1), timeout_s=WAIT_S)
        with pytest.raises(Refused, match="token"):
            await a.discover(b.endpoint.host, b.endpoint.port, timeout_s=WAIT_S)
        assert media(a) == media(b) == {}


async def test_another_worker_at_the_known_address_is_not_taken_for_the_one_wanted() -> None:
    async with running("a", "b", introduced=False) as (a, b):
        a.introduce(with_address(b.endpoint, worker="c"))
        with pytest.raises(PeerLost, match="'c' was dialled, 'b' answered"):
            await a.ask(Address(WorkerId("c"), "echo"), ReleaseLease(1), timeout_s=WAIT_S)


async def test_a_port_where_nobody_listens_fails_soon_and_again() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with running("a") as (a,):
            a.introduce(Endpoint(WorkerId("b"), "127.0.0.1", unused.getsockname()[1]))
            for _ in range(3):
                with pytest.raises(PeerLost, match="cannot reach"):
                    await a.ask(Address(WorkerId("b"), "x"), ReleaseLease(1), timeout_s=WAIT_S)


async def test_a_listener_that_says_nothing_is_bounded_by_the_asks_time_out() -> None:
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with tcp_server(hold) as port, running("a") as (a,):
        a.introduce(Endpoint(WorkerId("b"), "127.0.0.1", port))
        with pytest.raises(DeadlineExceeded):
            await a.ask(Address(WorkerId("b"), "x"), ReleaseLease(1), timeout_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await a.discover("127.0.0.1", port, timeout_s=0.05)
    for writer in held:
        writer.close()


async def test_a_worker_that_stops_is_noticed_at_once() -> None:
    async with running("a") as (a,):
        lost: list[WorkerId] = []
        a.watch(WorkerId("b"), lost.append)
        async with running("b", introduced=False) as (b,):
            a.introduce(b.endpoint)
            to = await b.register("recorder", Recorder())
            await a.tell(to, ReleaseLease(1))
            assert lost == []
        await until(lambda: lost == ["b"])
        with pytest.raises(PeerLost):
            await a.ask(to, ReleaseLease(1), timeout_s=WAIT_S)


async def test_a_worker_that_comes_back_under_its_name_is_reached_again() -> None:
    async with running("a") as (a,):
        echo = await a.register("echo", Echo())
        for _ in range(2):
            async with running("b", introduced=False) as (b,):
                b.introduce(a.endpoint)
                await b.ask(echo, ReleaseLease(1), timeout_s=WAIT_S)
                await a.ask(await b.register("echo", Echo()), ReleaseLease(1), timeout_s=WAIT_S)


async def test_a_new_instance_replaces_a_link_that_still_seems_open() -> None:
    async with running("a") as (a,):
        echo = await a.register("echo", Echo())
        lost: list[WorkerId] = []
        a.watch(WorkerId("b"), lost.append)
        old, new = (System(worker=WorkerId("b"), token=TOKEN) for _ in range(2))
        for system in (old, new):
            await system.start()
            system.introduce(a.endpoint)
            await system.ask(echo, ReleaseLease(1), timeout_s=WAIT_S)
        assert lost == ["b"]
        assert list(media(a)) == ["b"]
        assert (await a.ask(await new.register("x", Echo()), ReleaseLease(5), timeout_s=WAIT_S)).message == ReleaseLease(5)
        await idle(a, new)
        await old.stop()
        await new.stop()


async def test_a_hung_worker_is_given_up_after_missed_heartbeats() -> None:
    """The other end accepts, completes the handshake and then neither reads nor closes."""
    async with running("a", "b", heartbeat_s=0.02) as (a, b):
        recorder = Recorder()
        to = await b.register("recorder", recorder)
        lost: list[WorkerId] = []
        a.watch(b.worker, lost.append)
        ask = asyncio.ensure_future(a.ask(to, ReleaseLease(1), timeout_s=WAIT_S))
        await recorder.mail()
        link = b._open_links.get(a.worker)
        assert link is not None
        assert link._transport is not None
        assert link._timer is not None
        link._transport.pause_reading()
        link._timer.cancel()
        with pytest.raises(PeerLost, match="heartbeats"):
            await ask
        assert lost == ["b"]
        link._transport.resume_reading()
        await until(lambda: not media(b))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 64,
        b"\xff" * 100_000,
        HEADER.pack(Kind.ASK, 0, 0, 4, 1) + b"abcd",
        HEADER.pack(Kind.HELLO, 0, 0, 2**32 - 1, hello_id()),
        HEADER.pack(Kind.HELLO, 0, 65535, 4, hello_id()) + b"abcd",
        HEADER.pack(Kind.HELLO, 0, 0, 4, hello_id()) + b"abcd",
    ],
)
async def test_garbage_from_a_stranger_closes_that_socket_and_touches_nothing_else(data: bytes) -> None:
    async with running("a", "b") as (a, b):
        to = await b.register("echo", Echo())
        await a.ask(to, ReleaseLease(1), timeout_s=WAIT_S)
        reader, writer = await asyncio.open_connection(b.endpoint.host, b.endpoint.port)
        writer.write(data)
        async with asyncio.timeout(WAIT_S):
            said = b""
            with contextlib.suppress(ConnectionError):
                said = await reader.read()
        assert said == b"" or said[0] == Kind.GOODBYE
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert (await a.ask(to, ReleaseLease(2), timeout_s=WAIT_S)).message == ReleaseLease(2)


async def test_a_wrong_version_is_told_so() -> None:
    async with running("b") as (b,):
        reader, writer = await asyncio.open_connection(b.endpoint.host, b.endpoint.port)
        writer.write(HEADER.pack(Kind.HELLO, 0, 0, 4, hello_id(77)) + b"abcd")
        async with asyncio.timeout(WAIT_S):
            said = await reader.read()
        assert said[0] == Kind.GOODBYE
        assert b"wrong_version" in said
        assert b"77" in said
        writer.close()


async def test_a_reset_is_a_lost_link() -> None:
    async with running("b") as (b,):
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stranger.connect((b.endpoint.host, b.endpoint.port))
            await until(lambda: len(b._live_peers()._links) == 1)
        await until(lambda: len(b._live_peers()._links) == 0)


async def test_asks_of_one_link_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epd.microkernel.link._MAX_ASKS", 2)
    async with running("a", "b") as (a, b):
        recorder = Recorder()
        to = await b.register("recorder", recorder)
        asks = [asyncio.ensure_future(a.ask(to, ReleaseLease(i), timeout_s=WAIT_S)) for i in range(2)]
        mails = [await recorder.mail(0), await recorder.mail(1)]
        with pytest.raises(Overloaded, match="too many"):
            await a.ask(to, ReleaseLease(2), timeout_s=WAIT_S)
        for mail in mails:
            mail.reply.send(mail.message)
        await asyncio.gather(*asks)


async def test_a_stopped_system_refuses_to_dial() -> None:
    async with running("a", "b") as (a, b):
        to = await b.register("echo", Echo())
        await a.stop()
        with pytest.raises(PeerLost, match="stopping"):
            await a.ask(to, ReleaseLease(1), timeout_s=WAIT_S)
        with pytest.raises(PeerLost, match="stopping"):
            await a.discover(b.endpoint.host, b.endpoint.port, timeout_s=WAIT_S)
