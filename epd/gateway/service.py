"""The gateway's engine: admits a request, runs a journey per choice, turns tokens into text.

Owns: the choices of each request. Knows: admission, journeys, the detokenizer, what is counted. Does not know: HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from epd.errors import Overloaded
from epd.gateway.admission import Admission
from epd.gateway.attempt import Stages
from epd.gateway.detokenize import Detokenizer
from epd.gateway.journey import Journey
from epd.microkernel.tasks import settled
from epd.request import Delta, GenerateRequest
from epd.tokenizer import Tokenizer
from epd.trust import lag_doubts

_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that different choices never share a seed
_SEED_MASK = 2**63 - 1


class Gateway:
    """Implements `epd.gateway.engine.Engine`."""

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        stages: Stages,
        admission: Admission,
        loop_lag_s: Callable[[], float] = lambda: -1.0,
    ) -> None:
        self._model_name = model_name
        self._tokenizer = tokenizer
        self._stages = stages
        self._admission = admission
        self._observer = stages.observer
        self._loop_lag_s = loop_lag_s

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def max_choices(self) -> int:
        return self._admission.max_requests

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """See `Engine.generate`."""
        arrived = self._stages.clock()
        num_tokens = len(request.token_ids) * request.n
        try:
            self._admission.admit(request.request_id, num_prompt_tokens=num_tokens, num_choices=request.n, now=arrived)
        except Overloaded as error:
            self._observer.refused(error, arrived)
            raise
        watch = self._observer.admitted(request, arrived)
        try:
            choices = self._one(request, 0, arrived) if request.n == 1 else self._several(request, arrived)
            async with aclosing(choices) as deltas:
                async for delta in deltas:
                    watch.delta(self._stages.clock(), delta)
                    yield delta
            watch.finished(self._stages.clock(), "ok")
        except Exception as error:
            watch.finished(self._stages.clock(), getattr(error, "code", "internal"))
            raise
        finally:
            watch.finished(self._stages.clock(), "cancelled")
            self._admission.finish(request.request_id, now=self._stages.clock())

    def ready(self) -> tuple[bool, str]:
        missing = self._stages.fleet.missing_roles()
        return not missing, f"waiting for a worker of: {', '.join(missing)}" if missing else "ready"

    def cluster(self) -> dict[str, object]:
        lag_s = self._loop_lag_s()
        found = [doubt for member in self._stages.fleet.members() for doubt in member.doubts]
        if any(member.is_emulated for member in self._stages.fleet.members()):
            found += lag_doubts("gateway", lag_s)
        return {
            "model": self._model_name,
            "num_running": self._admission.num_running,
            "loop_lag_s": lag_s,
            "doubts": found,  # why figures of emulated devices are not to be believed
            **self._stages.fleet.describe(),
        }

    def metrics(self) -> bytes:
        return self._observer.metrics.render(self._stages.fleet.members(), loop_lag_s=self._loop_lag_s())

    def live(self, *, after_moment: int, after_revision: int) -> dict[str, object]:
        is_ready, reason = self.ready()
        seen = self._observer.describe(after_moment=after_moment, after_revision=after_revision)
        return {**self.cluster(), **seen, "is_ready": is_ready, "reason": reason}

    # --- choices ----------------------------------------------------------------------------------------------------

    async def _one(self, request: GenerateRequest, index: int, arrived: float) -> AsyncGenerator[Delta, None]:
        """One choice's text."""
        request = _with_seed_of(request, index)
        detokenizer = Detokenizer(self._tokenizer, request)
        journey = Journey(request, index, self._stages, deadline=arrived + request.deadline_s)
        num_cached = 0
        async with aclosing(journey.tokens()) as outputs:
            async for output in outputs:
                num_cached = max(num_cached, output.num_cached_tokens) if output.index == 0 else num_cached
                piece = detokenizer.feed(output.token)
                if piece is None:
                    continue
                yield Delta(index, piece.text, piece.num_tokens, piece.logprobs, piece.finish_reason, num_cached)
                num_cached = 0
                if piece.finish_reason:
                    return  # a stop string may end it before its tokens do

    async def _several(self, request: GenerateRequest, arrived: float) -> AsyncGenerator[Delta, None]:
        """All choices side by side. The first goes ahead to its first token, so that the others find its prompt cached."""
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async with aclosing(self._one(request, index, arrived)) as deltas:
                    async for delta in deltas:
                        queue.put_nowait(delta)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(0))]
        num_ended = 0
        try:
            while num_ended < request.n:
                item = await queue.get()
                if len(tasks) == 1:
                    tasks += [asyncio.create_task(pump(index)) for index in range(1, request.n)]
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_ended += 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await settled(*tasks)


def _with_seed_of(request: GenerateRequest, index: int) -> GenerateRequest:
    """Each choice draws with a seed of its own, which depends on (seed, index) only."""
    if index == 0:
        return request
    seed = (request.sampling.seed + index * _SEED_STEP) & _SEED_MASK
    return dataclasses.replace(request, sampling=msgspec.structs.replace(request.sampling, seed=seed))
