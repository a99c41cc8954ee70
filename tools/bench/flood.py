"""python -m tools.bench.flood PORT: a server that computes nothing and streams to very many clients: what does reading cost?

Whatever is asked at /v1/chat/completions is answered with `--num-tokens` tokens, one event each, `--rate` a second; streams are
spread evenly over the time between two tokens. It costs a few microseconds per token, so that a load generator on the next
core is the one that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import cast

import uvloop

_TICK_S = 0.001
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_FRAME = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "flood",
}


class Flood:
    """Everybody who is being streamed to, by the tick at which their tokens are due."""

    def __init__(self, rate: float, num_tokens: int) -> None:
        self._period = max(1, round(1.0 / rate / _TICK_S))  # ticks between two tokens of a stream
        self._num_tokens = num_tokens
        self._streams: list[list[_Connection]] = [[] for _ in range(self._period)]
        self._num_streams = 0
        self._token = _event({"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None})
        finish = _event({"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"})
        usage = _event(None, {"prompt_tokens": 8, "completion_tokens": num_tokens, "total_tokens": 8 + num_tokens})
        self._end = finish + usage + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def begin(self, connection: _Connection) -> None:
        connection.num_left = self._num_tokens
        self._streams[self._num_streams % self._period].append(connection)
        self._num_streams += 1

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        started, tick = loop.time(), 0
        while True:
            tick += 1
            await asyncio.sleep(max(0.0, started + tick * _TICK_S - loop.time()))
            due = self._streams[tick % self._period]
            for connection in due:
                connection.num_left -= 1
                connection.transport.write(self._token if connection.num_left else self._token + self._end)
            if any(not connection.num_left for connection in due):
                due[:] = [connection for connection in due if connection.num_left]

    def drop(self, connection: _Connection) -> None:
        for due in self._streams:
            if connection in due:
                due.remove(connection)


class _Connection(asyncio.Protocol):
    def __init__(self, flood: Flood) -> None:
        self.num_left = 0
        self.transport: asyncio.Transport
        self._flood = flood
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        self._pending += data
        head, end, body = self._pending.partition(b"\r\n\r\n")
        if not end:
            return
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        if len(body) < length:
            return
        self._pending = body[length:]
        if b"/chat/completions" in head.split(b"\r\n", 1)[0]:
            self.transport.write(_HEAD)
            self._flood.begin(self)
        else:
            models = json.dumps({"object": "list", "data": [{"id": "flood"}]}).encode()
            kind = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            self.transport.write(b"%sContent-Length: %d\r\n\r\n%s" % (kind, len(models), models))

    def connection_lost(self, error: Exception | None) -> None:
        if self.num_left:
            self._flood.drop(self)


def _event(choice: object, usage: object = None) -> bytes:
    event = {**_FRAME, "choices": [choice] if choice else [], "usage": usage}
    return _chunk(b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(flood: Flood, port: int) -> tuple[asyncio.Server, asyncio.Task[None]]:
    """A listening server, and the task that streams."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(flood), "127.0.0.1", port, backlog=4096)
    return server, loop.create_task(flood.run(), name="flood")


async def _serve_for_ever(port: int, rate: float, num_tokens: int) -> None:
    _, running = await serve(Flood(rate, num_tokens), port)
    await running


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.flood", description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=10.0, help="tokens per second of a stream (default: 10)")
    parser.add_argument("--num-tokens", type=int, default=100, help="of an answer (default: 100)")
    args = parser.parse_args(argv)
    try:
        uvloop.run(_serve_for_ever(args.port, args.rate, args.num_tokens))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
