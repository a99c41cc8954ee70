"""What a link costs beside a bare socket: `python -m tools.bench.link`.

Every figure of the product stands beside a baseline measured in the same run, in turns, between two processes in both cases,
and each is the best of many short rounds:

- ask: round trip of a small ask over TCP, against a bare uvloop Protocol that echoes frames of the same size;
- copy: a 64 MiB answer into memory made beforehand, against a blocking socket that does sendall / recv_into.

The rest (Unix socket, tells, asks while bulk travels, asks within a process) is printed for information and has no bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypedDict, cast

import uvloop

from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from protocol import codec
from protocol.frames import HEADER_BYTES
from protocol.messages import Address, Endpoint, ReleaseLease, Token, TokenStep, WorkerId

BULK_BYTES = 64 << 20
TOKEN = "bench"
SERVER = WorkerId("server")
ASK = ReleaseLease(12345)
ASK_BYTES = HEADER_BYTES + len(codec.encode_envelope("echo", ASK))
ANSWER_BYTES = HEADER_BYTES + len(codec.encode(ASK))
TELL = TokenStep(tokens=tuple((f"req-{i:08d}", 0, i, Token(token_id=1000 + i)) for i in range(8)))  # type: ignore[misc]  # a plain str
ASK_ROUNDS = 500
ASKS_PER_ROUND = 25  # about a millisecond: shorter than what a busy machine leaves a process at a time
TELLS_PER_ROUND = 200
COPY_ROUNDS = 60
_TIMEOUT_S = 60.0


class Row(TypedDict):
    """`ratio` is value / baseline; `bar` says what it has to be, or is empty."""

    name: str
    value: float
    unit: str
    baseline: float
    ratio: float
    bar: str


def run() -> dict[str, Any]:
    """Start the server process, measure, stop it. Takes about 20 s."""
    command = [sys.executable, "-m", "tools.bench.link", "--serve"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        ports = json.loads(server.stdout.readline())
        rows: list[Row] = uvloop.run(_measure(ports))
    finally:
        server.stdin.close()
        server.wait(_TIMEOUT_S)
        server.stdout.close()
    return {"name": "link", "bulk_bytes": BULK_BYTES, "ask_bytes": ASK_BYTES, "answer_bytes": ANSWER_BYTES, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a link costs beside a bare socket.")
    parser.add_argument("--serve", action="store_true", help="be the other process; used by the benchmark itself")
    if parser.parse_args().serve:
        uvloop.run(_serve())
        return
    result = run()
    print(f"{'':48} {'epd':>10} {'bare':>10} {'':6} {'ratio':>6}  bar")
    for row in result["rows"]:
        print(f"{row['name']:48} {row['value']:10.3g} {row['baseline']:10.3g} {row['unit']:6} {row['ratio']:6.2f}  {row['bar']}")


# --- the other process ----------------------------------------------------------------------------------------------


class _Server(Actor):
    """Answers an ask as it came, or with bulk if its lease id is 0; counts tells until asked."""

    def __init__(self) -> None:
        self._bulk = memoryview(bytearray(b"\x5a" * BULK_BYTES))

    async def receive(self, mail: Mail) -> None:
        if mail.reply.kind == "ask":
            is_bulk = isinstance(mail.message, ReleaseLease) and mail.message.lease_id == 0
            mail.reply.send(mail.message, [self._bulk] if is_bulk else ())


class _BareEcho(asyncio.Protocol):
    """Answers every ASK_BYTES bytes with ANSWER_BYTES bytes, and knows nothing else."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._num_bytes = 0
        self._answer = b"x" * ANSWER_BYTES

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        while self._num_bytes >= ASK_BYTES:
            self._num_bytes -= ASK_BYTES
            self._transport.write(self._answer)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    system = System(worker=SERVER, token=TOKEN)
    await system.start()
    await system.register("echo", _Server())
    bare = await loop.create_server(_BareEcho, "127.0.0.1", 0)
    raw_tcp = socket.create_server(("127.0.0.1", 0))
    raw_unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw_unix.bind("")  # the kernel chooses an abstract name
    raw_unix.listen()
    for listener in (raw_tcp, raw_unix):
        threading.Thread(target=_serve_raw, args=(listener,), daemon=True).start()
    told = {
        "endpoint": [system.endpoint.host, system.endpoint.port, system.endpoint.unix_path, system.endpoint.host_id],
        "bare": bare.sockets[0].getsockname()[1],
        "raw_tcp": raw_tcp.getsockname()[1],
        "raw_unix": raw_unix.getsockname().decode().replace("\0", "@"),
    }
    print(json.dumps(told), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until the benchmark closes it
    bare.close()
    await system.stop()


def _serve_raw(listener: socket.socket) -> None:
    """Send the bulk for every byte that comes."""
    bulk = bytearray(b"\x5a" * BULK_BYTES)
    while True:
        peer, _ = listener.accept()
        with peer:
            while peer.recv(1):
                peer.sendall(bulk)


# --- measuring ------------------------------------------------------------------------------------------------------


async def _measure(ports: dict[str, Any]) -> list[Row]:
    host, port, unix_path, host_id = ports["endpoint"]
    tcp, unix = System(worker=WorkerId("tcp"), token=TOKEN), System(worker=WorkerId("unix"), token=TOKEN)
    for system in (tcp, unix):
        await system.start()
    tcp.introduce(Endpoint(SERVER, host, port))
    unix.introduce(Endpoint(SERVER, host, port, unix_path, host_id))
    to = Address(SERVER, "echo")
    try:
        raw_tcp = socket.create_connection(("127.0.0.1", ports["raw_tcp"]))
        raw_unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw_unix.connect(ports["raw_unix"].replace("@", "\0"))
        room = memoryview(bytearray(b"\1" * BULK_BYTES))
        bare = await _BareClient.connect(ports["bare"])
        rows = [
            await _ask_row("ask, TCP, round trip", tcp, to, bare, bar="<= 2"),
            await _copy_row("64 MiB, TCP", tcp, to, raw_tcp, room, bar=">= 0.8"),
            await _ask_row("ask, Unix socket (bare: TCP)", unix, to, bare),
            await _copy_row("64 MiB, Unix socket", unix, to, raw_unix, room),
            await _tell_row(tcp, to, bare),
            await _contended_row(tcp, to, room),
            await _local_row(tcp, bare),
        ]
        raw_tcp.close()
        raw_unix.close()
        bare.close()
    finally:
        await tcp.stop()
        await unix.stop()
    return rows


async def _ask_row(name: str, system: System, to: Address, bare: _BareClient, *, bar: str = "") -> Row:
    async def ask() -> None:
        for _ in range(ASKS_PER_ROUND):
            await system.ask(to, ASK, timeout_s=_TIMEOUT_S)

    async def echo() -> None:
        for _ in range(ASKS_PER_ROUND):
            await bare.echo()

    ours, theirs = await _in_turns(ask, echo, ASK_ROUNDS)
    return _row(name, ours / ASKS_PER_ROUND * 1e6, theirs / ASKS_PER_ROUND * 1e6, "us", bar)


async def _copy_row(name: str, system: System, to: Address, raw: socket.socket, room: memoryview, *, bar: str = "") -> Row:
    async def ask() -> None:
        await system.ask(to, ReleaseLease(0), timeout_s=_TIMEOUT_S, into=[room])

    async def copy() -> None:
        raw.sendall(b"x")
        num_bytes = 0
        while num_bytes < BULK_BYTES:
            num_bytes += raw.recv_into(room[num_bytes:])

    ours, theirs = await _in_turns(ask, copy, COPY_ROUNDS)
    return _row(name, BULK_BYTES / 1e9 / ours, BULK_BYTES / 1e9 / theirs, "GB/s", bar)


async def _tell_row(system: System, to: Address, bare: _BareClient) -> Row:
    """Steps of 8 tokens a second, until all have been taken; beside the bare echo's round trips a second."""

    async def tell() -> None:
        for _ in range(TELLS_PER_ROUND):
            await system.tell(to, TELL, timeout_s=_TIMEOUT_S)
        await system.ask(to, ASK, timeout_s=_TIMEOUT_S)

    async def echo() -> None:
        for _ in range(ASKS_PER_ROUND):
            await bare.echo()

    ours, theirs = await _in_turns(tell, echo, ASK_ROUNDS)
    return _row("tells of 8 tokens, TCP (bare: round trips)", TELLS_PER_ROUND / ours, ASKS_PER_ROUND / theirs, "1/s", "")


async def _contended_row(system: System, to: Address, room: memoryview) -> Row:
    """Median of a small ask while 64 MiB answers travel the same way without a pause; beside an undisturbed one's."""

    async def bulk() -> None:
        while True:
            await system.ask(to, ReleaseLease(0), timeout_s=_TIMEOUT_S, into=[room])

    async def median(count: int) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            await system.ask(to, ASK, timeout_s=_TIMEOUT_S)
            times.append(time.perf_counter() - began)
            await asyncio.sleep(0.001)
        return statistics.median(times)

    quiet = await median(300)
    task = asyncio.ensure_future(bulk())
    await system.ask(to, ASK, timeout_s=_TIMEOUT_S)
    busy = await median(300)
    task.cancel()
    await asyncio.wait([task])
    return _row("ask beside 64 MiB answers, median (bare: alone)", busy * 1e3, quiet * 1e3, "ms", "")


async def _local_row(system: System, bare: _BareClient) -> Row:
    to = await system.register("local", _Server())
    row = await _ask_row("ask within the process (bare: TCP echo)", system, to, bare)
    await system.unregister("local")
    return row


async def _in_turns(
    ours: Callable[[], Awaitable[None]], theirs: Callable[[], Awaitable[None]], rounds: int
) -> tuple[float, float]:
    """The best of `rounds` short times of each, taken alternately.

    The best, because whatever else runs on the machine only ever adds, and adds most to whoever has more to do: it is the figure
    that two runs agree on.
    """
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, work in enumerate((ours, theirs)):
            began = time.perf_counter()
            await work()
            best[index] = min(best[index], time.perf_counter() - began)
    return best[0], best[1]


class _BareClient(asyncio.Protocol):
    def __init__(self) -> None:
        self._answer: asyncio.Future[None] | None = None
        self._num_bytes = 0
        self._ask = b"x" * ASK_BYTES

    @classmethod
    async def connect(cls, port: int) -> _BareClient:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    async def echo(self) -> None:
        self._answer = self._loop.create_future()
        self._transport.write(self._ask)
        await self._answer

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes >= ANSWER_BYTES and self._answer is not None:
            self._num_bytes -= ANSWER_BYTES
            self._answer.set_result(None)

    def close(self) -> None:
        self._transport.close()


def _row(name: str, value: float, baseline: float, unit: str, bar: str) -> Row:
    return Row(name=name, value=value, unit=unit, baseline=baseline, ratio=value / baseline, bar=bar)


if __name__ == "__main__":
    main()
