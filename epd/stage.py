"""What the three stage actors have in common: a loop that steps while there is work, and a sweep that lets nothing stay for ever.

A stage actor is the I/O shell round a pure scheduler. It answers messages, drives the runner on its own stream, and reports load.
It does not decide: what runs next is its scheduler's word.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import ClassVar

from epd.clock import Clock
from epd.distribution import Spreads
from epd.errors import BadRequest, EpdError, InternalError, Unavailable
from epd.log import Log
from epd.microkernel.actor import Actor, Mail
from protocol.messages import LinkLoad, Span, StageLoad

SWEEP_S = 0.5
_FIGURES = {
    "encode queue": "queue_seconds",
    "preprocess": "preprocess_seconds",
    "encode": "encode_seconds",
    "prefill queue": "queue_seconds",
    "prefill": "prefill_seconds",
    "decode reserve": "queue_seconds",
    "transfer": "kv_receive_seconds",
    "decode": "decode_seconds",
}
"""What the spans that stages report are counted as."""


class StageActor(Actor):
    """Base of encode, prefill and decode. A subclass gives `step`, `sweep`, `load` and its messages."""

    role: ClassVar[str]

    def __init__(self, *, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_tokens = 0
        self.spread = Spreads()
        self.is_draining = False
        self.is_clean = True
        self.neighbours: tuple[StageActor, ...] = ()  # stages that take blocks from the same pool
        self._wake = asyncio.Event()
        self._went_idle = asyncio.Event()
        self._was_idle = False  # when last looked at
        self._num_proved = 0  # steps before the last proof
        self._log = Log(self.role)

    async def started(self) -> None:
        self.spawn(self._loop(), name=f"{self.role} loop")
        self.spawn(self._sweep(), name=f"{self.role} sweep")

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def freed(self) -> None:
        """Blocks may have come back to the pool: whoever waits for some may go on."""
        self.wake()
        for neighbour in self.neighbours:
            neighbour.wake()

    async def idle(self) -> None:
        """Wait until nothing runs, waits or is leased. Its bound is the caller's."""
        while not self.is_idle():
            self._went_idle.clear()
            await self._went_idle.wait()

    def stepped(self, started: float, num_tokens: int) -> None:
        """Count a step that began at `started` and ends now."""
        elapsed_s = self.clock() - started
        self.busy_s += elapsed_s
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.spread.observe("step_seconds", elapsed_s)
        self.spread.observe("step_tokens", num_tokens)

    def counted(self, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        """The spans of a request that are about to be reported, counted among all requests'."""
        for span in spans:
            figure = _FIGURES.get(span.name)
            if figure is not None:
                self.spread.observe(figure, span.end_s - span.start_s)
        return spans

    @property
    def has_pool_to_itself(self) -> bool:
        """Nobody else holds blocks of it now, so that its counts can be compared with this stage's own tables. (With everybody's
        tables they could at any time, but whoever works meanwhile would wait for it.)
        """
        return all(neighbour.is_idle() for neighbour in self.neighbours)

    def refuse_if_draining(self) -> None:
        if self.is_draining:
            raise Unavailable(f"this {self.role} worker is leaving: ask another one")

    @abstractmethod
    async def receive(self, mail: Mail) -> None: ...

    @abstractmethod
    async def step(self) -> bool:
        """Do one step of work. False: there is nothing to do until something wakes the loop."""

    @abstractmethod
    def sweep(self, now: float) -> None:
        """Let go of what has expired."""

    @abstractmethod
    def load(self) -> StageLoad: ...

    @abstractmethod
    def links(self) -> list[LinkLoad]: ...

    @abstractmethod
    def is_idle(self) -> bool:
        """Nothing runs, waits or is leased."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raises when a table, pool or cache contradicts itself."""

    async def evacuate(self) -> None:
        """Send away what can go on elsewhere; what cannot fails with this worker's end and is tried again by its gateway."""

    async def _loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if await self.step():
                self._wake.set()
                # A step that had nothing to await would keep the mailbox from being read.
                await asyncio.sleep(0)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.look_round()

    def look_round(self) -> None:
        """Let go of what has expired; at idle, prove what is owned, once per pause: a large pool takes milliseconds."""
        self.sweep(self.clock())
        is_idle = self.is_idle()
        if is_idle:
            self._went_idle.set()
            if not self._was_idle or self.num_steps != self._num_proved:  # there may have been work since, and nobody saw it
                self._num_proved = self.num_steps
                self._prove()
        self._was_idle = is_idle
        self.wake()

    def _prove(self) -> None:
        try:
            self.check_integrity()
        except Exception as error:
            if self.is_clean:
                self._log.error("integrity check failed at idle", error=error)
            self.is_clean = False


def unexpected(actor: StageActor, mail: Mail) -> InternalError:
    return InternalError(f"the {actor.role} stage was sent {type(mail.message).__name__}")


def whose_fault(actor: StageActor, error: Exception) -> EpdError:
    """What a request is told that made a step fail: the client's fault if the runner says so, else ours."""
    return error if isinstance(error, BadRequest) else InternalError(f"{actor.role} failed: {error}")
