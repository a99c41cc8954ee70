"""A server that plays scripts on a clock that stands still unless a script moves it, so that every latency is known exactly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer


class VirtualClock:
    """Reads the same until it is moved. Counts how often it was read, so that a script can wait for the client."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._reads = 0
        self._was_read = asyncio.Event()

    def __call__(self) -> float:
        self._reads += 1
        self._was_read.set()
        return self.now_s

    @property
    def reads(self) -> int:
        return self._reads

    async def wait_for_read(self, after: int) -> None:
        while self._reads <= after:
            self._was_read.clear()
            await self._was_read.wait()


@dataclass(frozen=True)
class Send:
    """Write `data` when `after_s` of virtual time have passed; go on when the client has taken note of it."""

    data: bytes
    after_s: float = 0.0


@dataclass(frozen=True)
class Cut:
    """Close the connection in the middle of the body."""


@dataclass(frozen=True)
class Hang:
    """Say nothing more until the client has left."""


@dataclass(frozen=True)
class Status:
    """Answer with this and no stream."""

    status: int
    body: str = ""
    content_type: str = "application/json"


Step = Send | Cut | Hang | Status


def event(data: dict[str, Any] | str) -> bytes:
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def finish(reason: str = "length") -> bytes:
    return event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


def usage(input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> bytes:
    details = {"cached_tokens": cached_tokens}
    tokens = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "prompt_tokens_details": details}
    return event({"choices": [], "usage": tokens})


DONE = event("[DONE]")


def answer(delays_s: Sequence[float], *, input_tokens: int = 5) -> list[Step]:
    """A whole good answer: one token after each delay, the end at once after the last."""
    steps: list[Step] = [Send(event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}))]
    steps += [Send(piece(f"w{i} "), after_s=delay_s) for i, delay_s in enumerate(delays_s)]
    steps.append(Send(finish() + usage(input_tokens, len(delays_s)) + DONE))
    return steps


class ScriptedServer:
    """Plays `scripts[i]` to request number i, the last one to all that follow. `bodies` holds what was asked."""

    def __init__(self, clock: VirtualClock | None, scripts: Sequence[Sequence[Step]]) -> None:
        self._clock = clock
        self._scripts = scripts
        self._leave = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        server = TestServer(app)
        await server.start_server()
        self.url = str(server.make_url("/v1"))
        try:
            yield self
        finally:
            self._leave.set()
            await server.close()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        script = self._scripts[min(len(self.bodies), len(self._scripts) - 1)]
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if isinstance(step := script[0], Status):
            return web.Response(status=step.status, text=step.body, content_type=step.content_type)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for step in script:
            if isinstance(step, Send):
                await self._send(response, step)
            elif isinstance(step, Cut):
                assert request.transport is not None
                request.transport.abort()
                return response
            else:
                await self._leave.wait()
        return response

    async def _send(self, response: web.StreamResponse, step: Send) -> None:
        if self._clock is None:
            await response.write(step.data)
            return
        self._clock.now_s += step.after_s
        reads = self._clock.reads
        await response.write(step.data)
        await self._clock.wait_for_read(reads)
