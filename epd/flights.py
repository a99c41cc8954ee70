"""The steps that a stage has given to its stream and not booked yet.

A stage keeps its stream supplied without waiting: it launches steps as far as its scheduler plans ahead, goes back to its loop,
and is woken when the oldest has come back. Whatever a step reads and writes is kept until then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from epd.clock import Clock
from epd.step import StepOutput, StepPlan, TextRunner

if TYPE_CHECKING:
    from gpu.stream import Stream

PlanT = TypeVar("PlanT")


@dataclass(frozen=True, slots=True)
class Landing(Generic[PlanT]):
    """A step that has come back."""

    plan: PlanT  # the scheduler's
    num_tokens: int
    began_s: float  # when it was launched, or when the step before it came back: from then on it had the stream to itself
    landed_s: float
    output: StepOutput | Exception


@dataclass(frozen=True, slots=True)
class _Flight(Generic[PlanT]):
    plan: PlanT
    step: StepPlan | None  # with the embedding rows that the runner reads; None where it could not even be described
    launched_s: float
    submitted: Future[StepOutput]
    future: asyncio.Future[StepOutput]


class Flights(Generic[PlanT]):
    """`wake` is called when a step has come back; then `landed` has it."""

    def __init__(self, stream: Stream, runner: TextRunner, *, wake: Callable[[], None], clock: Clock) -> None:
        self._stream = stream
        self._runner = runner
        self._wake = wake
        self._clock = clock
        self._flights: deque[_Flight[PlanT]] = deque()
        self._last_landed_s = float("-inf")

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, plan: PlanT, describe: Callable[[PlanT], StepPlan]) -> None:
        """Give a step to the stream. What goes wrong here goes wrong with the step: it lands with its error."""
        step: StepPlan | None = None
        submitted: Future[StepOutput]
        try:
            step = describe(plan)
            submitted = self._stream.submit(self._runner.execute, step)
        except Exception as error:
            submitted = Future()
            submitted.set_exception(error)
        future = asyncio.wrap_future(submitted)
        future.add_done_callback(lambda _: self._wake())
        self._flights.append(_Flight(plan, step, self._clock(), submitted, future))

    def landed(self) -> Iterator[Landing[PlanT]]:
        """Steps that have come back, in the order in which they were launched; each is told once."""
        while self._flights and self._flights[0].future.done():
            flight = self._flights.popleft()
            error = flight.future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            began_s, landed_s = max(flight.launched_s, self._last_landed_s), self._clock()
            self._last_landed_s = landed_s
            num_tokens = flight.step.num_tokens if flight.step is not None else 0
            yield Landing(flight.plan, num_tokens, began_s, landed_s, error if error is not None else flight.future.result())

    async def settle(self) -> None:
        """Drop what has not begun and wait for what has, for cleaning up."""
        flights = list(self._flights)
        self._flights.clear()
        # The last first: what is dropped cannot begin while those before it end.
        begun = [flight.future for flight in reversed(flights) if not flight.submitted.cancel()]
        if begun:
            await asyncio.wait(begun)
        for future in begun:
            if not future.cancelled():
                future.exception()  # nobody is left who would want to know
