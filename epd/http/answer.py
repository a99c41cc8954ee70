"""From a checked request to an answer: runs the engine and sends what it yields, streamed or whole.

The engine's generators are closed as soon as the answer ends, fails or the client leaves, on every path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from aiohttp import web

from epd.errors import EpdError, InternalError
from epd.gateway.engine import Engine
from epd.http.chunks import Choice, Format, Usage
from epd.http.errors import error_body
from epd.http.sse import COMMENT, DONE, EventStream
from epd.log import Log
from epd.microkernel.tasks import settled
from epd.request import Delta, GenerateRequest
from epd.timeline import Timeline

# How long an answer may stay without its first text before the stream is opened: until then a failure has a status of its own.
PATIENCE_S = 2.0
KEEP_ALIVE_S = 10.0
_MERGE_ROOM = 64
_log = Log("http")


@dataclass(frozen=True, slots=True)
class Answer:
    """One client request on its way through the engine: a generate request for each of its prompts."""

    requests: Sequence[GenerateRequest]
    form: Format
    include_usage: bool
    timeline: Timeline | None = None  # asked for by the client

    @property
    def num_choices(self) -> int:
        return sum(request.n for request in self.requests)

    async def whole(self, engine: Engine) -> bytes:
        """The body of an answer that is not streamed.

        Raises:
            EpdError: as the engine does.
        """
        choices = [Choice() for _ in range(self.num_choices)]
        usage = self._usage()
        async with aclosing(self._outputs(engine)) as outputs:
            async for delta in outputs:
                choices[delta.index].add(delta)
                usage.add(delta)
        if not all(choice.finish_reason for choice in choices):
            raise _ended_early()
        return self.form.whole(choices, usage, None if self.timeline is None else self.timeline.spans())

    async def stream(self, engine: Engine, request: web.Request, *, patience_s: float, keep_alive_s: float) -> web.StreamResponse:
        """Send the answer as events. An error before the first text is raised; a later one becomes the last event."""
        async with aclosing(self._outputs(engine)) as outputs:
            first = asyncio.create_task(_first(outputs), name="first delta")
            try:
                await asyncio.wait((first,), timeout=patience_s)
                if first.done():
                    first.result()
                async with EventStream(request, keep_alive_s=keep_alive_s) as events:
                    await self._send_all(events, first, outputs)
                    return events.response
            finally:
                await _settle(first)

    async def _send_all(self, events: EventStream, first: asyncio.Task[Delta], outputs: AsyncGenerator[Delta, None]) -> None:
        usage, form = self._usage(), self.form
        num_left = self.num_choices
        try:
            events.add(form.opening(num_left) or COMMENT)
            if not first.done():
                await events.flush()
            delta = await first
            while True:
                usage.add(delta)
                events.add(form.delta(delta))
                if events.is_full:
                    await events.flush()
                if delta.finish_reason:
                    num_left -= 1
                    if not num_left:
                        break
                delta = await events.next_of(outputs)
        except EpdError as error:
            events.add(_error_event(error))
        except StopAsyncIteration:
            events.add(_error_event(_ended_early()))
        except ConnectionError:
            raise  # the client has gone: there is nobody to tell
        except Exception as error:
            _log.error("stream failed", error=error)
            events.add(_error_event(InternalError("internal error")))
        else:
            if self.include_usage:
                events.add(form.usage(usage))
            if self.timeline is not None:
                events.add(form.timeline(self.timeline.spans()))
            events.add(DONE)

    def _usage(self) -> Usage:
        num_prompt_tokens = sum(len(request.token_ids) for request in self.requests)
        return Usage(num_prompt_tokens=num_prompt_tokens, num_choices=self.requests[0].n)

    def _outputs(self, engine: Engine) -> AsyncGenerator[Delta, None]:
        """The deltas of all prompts as they come, their index counted over all of them."""
        if len(self.requests) == 1:
            return engine.generate(self.requests[0])
        return _merged([engine.generate(request) for request in self.requests], self.requests[0].n)


async def _merged(sources: Sequence[AsyncGenerator[Delta, None]], num_choices: int) -> AsyncGenerator[Delta, None]:
    """Several generators as one. The first error ends all of them."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(_MERGE_ROOM)

    async def pump(prompt: int, source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    await queue.put(msgspec.structs.replace(delta, index=prompt * num_choices + delta.index))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(prompt, source), name=f"prompt {prompt}") for prompt, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await settled(*tasks)


async def _first(outputs: AsyncGenerator[Delta, None]) -> Delta:
    try:
        return await anext(outputs)
    except StopAsyncIteration:
        raise _ended_early() from None


def _ended_early() -> InternalError:
    return InternalError("the engine ended before all choices were finished")


def _error_event(error: EpdError) -> bytes:
    return b"event: error\ndata: " + error_body(error) + b"\n\n"


async def _settle(task: asyncio.Task[Delta]) -> None:
    """Leave no task behind, nor an error that nobody looked at."""
    if not task.done():
        task.cancel()
        await settled(task)
    if not task.cancelled():
        task.exception()
