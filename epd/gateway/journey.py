"""Start reading here: the life of one choice of one request, from placement to its last token.

A journey is a sequence of attempts (`gateway/attempt.py`). When a stage fails, the next attempt prefills the prompt followed by
what was generated so far; because the noise of a token is a function of (seed, position), it goes on with the very tokens that
the failed attempt would have given.

Owns: the progress of its choice (`State`) and its tokens in order. Knows: the fleet and when to try again. Does not know: HTTP,
text, blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import Enum

from epd.errors import CorruptTransfer, DeadlineExceeded, EpdError, InternalError
from epd.gateway.attempt import Attempt, OutputToken, Stages
from epd.log import Log
from epd.request import GenerateRequest
from protocol.messages import Preempted, RequestId, WorkerId

MAX_FAILED_ATTEMPTS = 6
FIRST_BACKOFF_S = 0.02
MAX_WAIT_FOR_REPORT_S = 0.25  # for decode to tell how its time went, which it mostly has by the time of the last token
_log = Log("journey")


class State(Enum):
    PLACING = "placing"
    PREFILLING = "prefilling"  # with encode, while images are missing
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


_NEXT: dict[State, frozenset[State]] = {
    State.PLACING: frozenset({State.PREFILLING, State.FAILED, State.ABORTED}),
    State.PREFILLING: frozenset({State.PLACING, State.DECODING, State.FINISHED, State.FAILED, State.ABORTED}),
    State.DECODING: frozenset({State.PLACING, State.FINISHED, State.FAILED, State.ABORTED}),
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.ABORTED: frozenset(),
}


class Journey:
    """One choice. Iterate `tokens()` to its end, or close it to abort."""

    def __init__(self, request: GenerateRequest, choice: int, stages: Stages, *, deadline: float) -> None:
        self.request_id = RequestId(f"{request.request_id}/{choice}")
        self.state = State.PLACING
        self._request = request
        self._stages = stages
        self._deadline = deadline
        self._output: list[int] = []
        self._epoch = 0
        self._num_failed = 0
        self._salt = ""
        self._avoid: set[WorkerId] = set()
        self._attempt_began_s = 0.0  # on the timeline
        self._ended_early_at: float | None = None  # when the last attempt did, until a token has come after it

    async def tokens(self) -> AsyncGenerator[OutputToken, None]:
        """The choice's tokens in order, each once; the last one carries its finish reason.

        Raises:
            EpdError: what ended the request, after everything that could be tried was tried.
        """
        try:
            while self.state is not State.FINISHED:
                attempt = await self._next_attempt()
                try:
                    async with aclosing(self._run(attempt)) as outputs:
                        async for output in outputs:
                            yield output
                except EpdError as error:
                    await self._back_off_or_raise(error, attempt)
        except EpdError:
            self._enter(State.FAILED)
            raise
        finally:
            if self.state not in (State.FINISHED, State.FAILED):
                self._enter(State.ABORTED)

    async def _next_attempt(self) -> Attempt:
        """Choose the workers and describe the work that is left: the prompt and what came out of it so far."""
        token_ids = (*self._request.token_ids, *self._output)
        timeline = self._request.timeline
        began_s = self._attempt_began_s = timeline.now()
        placed = await self._stages.fleet.place(
            token_ids, self._request, salt=self._salt, avoid=frozenset(self._avoid), timeout_s=self._time_left()
        )
        timeline.add("placement", "gateway", began_s)
        self._epoch += 1
        return Attempt(
            self._stages,
            self._request,
            self.request_id,
            placed,
            token_ids=token_ids,
            epoch=self._epoch,
            salt=self._salt,
            timeout_s=self._time_left(),
        )

    async def _run(self, attempt: Attempt) -> AsyncGenerator[OutputToken, None]:
        """One attempt's tokens, until the choice is finished or gave way to others on its decode worker."""
        self._enter(State.PREFILLING)
        early: dict[int, OutputToken] = {}  # prefill and decode answer over different links: decode may be heard first
        async with attempt:
            while self.state is not State.FINISHED:
                event = await attempt.next_event()
                if isinstance(event, Preempted):
                    self._enter(State.PLACING)
                    self._begin_again("preempted")
                    return
                early[event.index] = event
                while (output := early.pop(len(self._output), None)) is not None:
                    self._advance(output)
                    if output.token.finish_reason:
                        await attempt.reported(MAX_WAIT_FOR_REPORT_S)
                    yield output

    def _advance(self, output: OutputToken) -> None:
        self._output.append(output.token.token_id)
        if self._ended_early_at is not None:
            self._stages.observer.recovered(self._stages.clock() - self._ended_early_at)
            self._ended_early_at = None
        if output.token.finish_reason:
            self._enter(State.FINISHED)
        elif self.state is State.PREFILLING:
            self._enter(State.DECODING)

    async def _back_off_or_raise(self, error: EpdError, attempt: Attempt) -> None:
        self._num_failed += 1
        self._stages.observer.attempt_failed(error, attempt.suspect)
        name, suspect = f"failed: {error.code}", attempt.suspect or ""
        self._request.timeline.add(name, "gateway", self._attempt_began_s, worker=suspect)
        if isinstance(error, CorruptTransfer):
            # It may be the owner's own memory that is spoilt, and then its prefix cache is not to be trusted for this prompt.
            self._salt = f"{self.request_id}#{self._epoch}"
        if not error.retryable or self._num_failed >= MAX_FAILED_ATTEMPTS:
            raise error
        _log.warning("trying again", request=self.request_id, reason=f"{error.code}: {error.message}", failed=self._num_failed)
        if attempt.suspect is not None:
            self._avoid.add(attempt.suspect)
        self._enter(State.PLACING)
        self._begin_again(error.code)
        await asyncio.sleep(min(self._time_left(), FIRST_BACKOFF_S * 2 ** (self._num_failed - 1)))

    def _begin_again(self, reason: str) -> None:
        self._stages.observer.begun_again(reason)
        self._ended_early_at = self._stages.clock()

    def _time_left(self) -> float:
        left = self._deadline - self._stages.clock()
        if left <= 0:
            raise DeadlineExceeded(f"the request did not finish within {self._request.deadline_s:g} s")
        return left

    def _enter(self, state: State) -> None:
        if state not in _NEXT[self.state]:
            raise InternalError(f"request {self.request_id} cannot go from {self.state.value} to {state.value}")
        self.state = state
