"""From a checked request to an answer: runs the engine and sends what it yields, streamed or whole.

The engine's generators are closed as soon as the answer ends, fails or the client leaves, on every path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web

from epd.errors import EpdError, InternalError
from epd.gateway.engine import Engine
from epd.http.chunks import Choice, Format, Usage
from epd.http.errors import error_body
from epd.http.sse import DONE, EventStream
from epd.log import Log
from epd.request import Delta, GenerateRequest

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
            async for prompt, delta in outputs:
                choices[self._index(prompt, delta)].add(delta)
                usage.add(delta, first_of_prompt=delta.index == 0)
        if not all(choice.finish_reason for choice in choices):
            raise InternalError("the engine ended before all choices were finished")
        return self.form.whole(choices, usage)

    async def stream(self, engine: Engine, request: web.Request, *, patience_s: float, keep_alive_s: float) -> web.StreamResponse:
        """Send the answer as events. An error before the first text is raised; a later one becomes the last event."""
        async with aclosing(self._outputs(engine)) as outputs:
            first = asyncio.create_task(_next(outputs), name="first delta")
            try:
                await asyncio.wait((first,), timeout=patience_s)
                if first.done():
                    first.result()
                async with EventStream(request, keep_alive_s=keep_alive_s) as events:
                    await self._send_all(events, first, outputs)
                    return events.response
            finally:
                await _settle(first)

    async def _send_all(
        self, events: EventStream, first: asyncio.Task[tuple[int, Delta]], outputs: AsyncGenerator[tuple[int, Delta], None]
    ) -> None:
        usage, form = self._usage(), self.form
        num_finished = 0
        try:
            if opening := form.opening(self.num_choices):
                await events.send(opening)
            prompt, delta = await first
            while True:
                usage.add(delta, first_of_prompt=delta.index == 0)
                await events.send(form.delta(delta, self._index(prompt, delta)))
                if delta.finish_reason:
                    num_finished += 1
                    if num_finished == self.num_choices:
                        break
                prompt, delta = await _next(outputs)
        except EpdError as error:
            await events.send(b"event: error\ndata: " + error_body(error) + b"\n\n")
            return
        except ConnectionError:
            raise  # the client has gone: there is nobody to tell
        except Exception as error:
            _log.error("stream failed", error=error)
            await events.send(b"event: error\ndata: " + error_body(InternalError("internal error")) + b"\n\n")
            return
        await events.send((form.usage(usage) if self.include_usage else b"") + DONE)

    def _usage(self) -> Usage:
        return Usage(num_prompt_tokens=sum(len(request.token_ids) for request in self.requests))

    def _index(self, prompt: int, delta: Delta) -> int:
        return prompt * self.requests[0].n + delta.index

    def _outputs(self, engine: Engine) -> AsyncGenerator[tuple[int, Delta], None]:
        """(number of the prompt, delta) of all prompts as they come."""
        if len(self.requests) == 1:
            return _numbered(engine.generate(self.requests[0]))
        return _merged([engine.generate(request) for request in self.requests])


async def _numbered(deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[tuple[int, Delta], None]:
    async with aclosing(deltas):
        async for delta in deltas:
            yield 0, delta


async def _merged(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Several generators as one. The first error ends all of them."""
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(_MERGE_ROOM)

    async def pump(prompt: int, source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    await queue.put((prompt, delta))
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
        await asyncio.wait(tasks)


async def _next(outputs: AsyncGenerator[tuple[int, Delta], None]) -> tuple[int, Delta]:
    try:
        return await anext(outputs)
    except StopAsyncIteration:
        raise InternalError("the engine ended before all choices were finished") from None


async def _settle(task: asyncio.Task[tuple[int, Delta]]) -> None:
    """Leave no task behind, nor an error that nobody looked at."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
