"""One try at a request with chosen workers: the asks to encode, prefill and decode that run side by side.

The images go to encode workers one by one; the prompt goes to the prefill worker at once, which runs up to the first image that
is not there yet; decode reserves blocks and pulls KV while prefill still works. Every ask ends in an event, for the journey.

Owns: the tasks of its asks. Knows: who is asked what. Does not know: whether to try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from epd.clock import Clock
from epd.errors import DeadlineExceeded, EpdError, InternalError, PeerLost
from epd.gateway.fleet import Fleet, Placed
from epd.gateway.observer import Observer
from epd.gateway.router import TokenRouter
from epd.log import Log
from epd.microkernel.system import System
from epd.microkernel.tasks import settled
from epd.request import GenerateRequest
from protocol.messages import (
    Abort,
    Address,
    Decode,
    EmbeddingReady,
    EmbeddingTaken,
    Encode,
    Encoded,
    Endpoint,
    Finished,
    Preempted,
    Prefill,
    Prefilled,
    RequestId,
    Span,
    Token,
    WorkerId,
)

MAX_ENCODES = 5  # of one image in one attempt
FIRST_BACKOFF_S = 0.02
ABORT_TIMEOUT_S = 1.0
LATE_TOKENS_S = 10.0  # for tokens to come after decode has said that it is done; a stage gives up sending them before that
_log = Log("attempt")


@dataclass(frozen=True, slots=True)
class Stages:
    """What a journey acts through."""

    system: System
    fleet: Fleet
    router: TokenRouter
    clock: Clock
    observer: Observer


@dataclass(frozen=True, slots=True)
class OutputToken:
    """A token and its place in the output."""

    index: int
    token: Token
    num_cached_tokens: int = 0  # told by prefill, with the first token of an attempt


Event = OutputToken | Preempted


class Attempt:
    """Use as an async context manager; leaving it cancels what is left and makes every stage forget the request."""

    def __init__(
        self,
        stages: Stages,
        request: GenerateRequest,
        request_id: RequestId,
        placed: Placed,
        *,
        token_ids: tuple[int, ...],
        epoch: int,
        salt: str,
        timeout_s: float,
    ) -> None:
        self.suspect: WorkerId | None = None  # who is to be avoided by the next attempt, once one has failed
        self._stages = stages
        self._request = request
        self._request_id = request_id
        self._placed = placed
        self._epoch = epoch
        self._salt = salt
        self._token_ids = np.asarray(token_ids, dtype="<i4").tobytes()
        self._num_output = len(token_ids) - len(request.token_ids)
        self._deadline = stages.clock() + timeout_s
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._provides: list[asyncio.Task[None]] = []  # of these, those that bring an image to prefill
        self._decoding: asyncio.Task[None] | None = None
        self._encoders: set[WorkerId] = set()  # who was asked to encode
        self._num_delivered = 0  # images that prefill has taken
        self._timer: asyncio.TimerHandle | None = None
        self._is_finished = False
        self._next_index = self._num_output + 1  # of the token that decode sends next
        self._has_last = asyncio.Event()

    async def __aenter__(self) -> Attempt:
        loop = asyncio.get_running_loop()
        overdue = DeadlineExceeded(f"the request did not finish within {self._request.deadline_s:g} s")
        self._timer = loop.call_later(self._time_left(), self._events.put_nowait, overdue)
        self._stages.router.attach(self._request_id, self._epoch, self._on_token)
        self._begin(self._prefill(), role="prefill")
        # The first token always comes from prefill: with room for one only there is nothing to decode.
        if self._needs_decode:
            self._decoding = self._begin(self._decode(), role="decode")
        for index in range(len(self._request.images)):
            self._provides.append(self._begin(self._provide(index), role="encode"))
        return self

    async def next_event(self) -> Event:
        """The next thing that happened. Raises the failure of any ask."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, OutputToken) and event.token.finish_reason:
            # When prefill's own token is the last, decode may still be pulling what nobody needs.
            self._is_finished = event.index > self._num_output or not self._needs_decode
        return event

    async def reported(self, timeout_s: float) -> None:
        """Wait until decode has told how its time went, which it does right after its last token."""
        if self._decoding is not None:
            await asyncio.wait([self._decoding], timeout=timeout_s)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A client that leaves may be noticed twice, by a write and by its connection: the second does not stop the clean-up.
        closing = asyncio.create_task(self._close(was_left=kind is not None), name=f"close {self._request_id}#{self._epoch}")
        await settled(closing)
        closing.result()

    async def _close(self, *, was_left: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stages.router.detach(self._request_id, self._epoch)
        self._placed.release()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        # A choice that decode finished is known to every stage. All other ends are news to prefill, decode or both.
        if not self._is_finished or was_left:
            await self._abort(self._at("prefill"), self._at("decode"))
        # Whoever encoded what nobody fetched may have answered into the void, with a lease.
        if self._num_delivered < len(self._request.images):
            await self._abort(*(Address(worker, "encode") for worker in sorted(self._encoders)))

    # --- the asks ---------------------------------------------------------------------------------------------------

    async def _prefill(self) -> None:
        message = Prefill(
            request_id=self._request_id,
            epoch=self._epoch,
            token_ids=self._token_ids,
            num_prompt_tokens=len(self._request.token_ids),
            items=tuple(image.item for image in self._request.images),
            sampling=self._request.sampling,
            deadline_s=self._time_left(),
            salt=self._salt,
        )
        to, asked_s = self._at("prefill"), self._now_s()
        answer = await self._stages.system.ask(to, message, timeout_s=message.deadline_s)
        if not isinstance(answer.message, Prefilled):
            raise InternalError(f"prefill answered {type(answer.message).__name__}")
        self._placed.prefilled()
        for task in self._provides:
            task.cancel()  # what is not there yet was in the prefix cache, and prefill has forgotten the request
        prefilled = answer.message
        self._events.put_nowait(OutputToken(self._num_output, prefilled.token, prefilled.num_cached_tokens))
        self._report(to, asked_s, prefilled.spans)

    async def _decode(self) -> None:
        message = Decode(
            request_id=self._request_id,
            epoch=self._epoch,
            token_ids=self._token_ids,
            num_prompt_tokens=len(self._request.token_ids),
            items=tuple(image.item for image in self._request.images),
            sampling=self._request.sampling,
            deadline_s=self._time_left(),
            prefill=self._placed.prefill,
            gateway=self._stages.router.address,
            salt=self._salt,
        )
        to, asked_s = self._at("decode"), self._now_s()
        answer = await self._stages.system.ask(to, message, timeout_s=message.deadline_s)
        match answer.message:
            case Preempted() as preempted:
                self._events.put_nowait(preempted)
            case Finished() as finished:
                self._report(to, asked_s, finished.spans)
                await self._await_tokens(finished.num_output_tokens)
            case other:
                raise InternalError(f"decode answered {type(other).__name__}")

    async def _await_tokens(self, num_output: int) -> None:
        """Tokens travel by another way than the answer, and a mailbox that stays full may have cost the last of them."""
        if self._next_index >= num_output:
            return
        try:
            async with asyncio.timeout(LATE_TOKENS_S):
                await self._has_last.wait()
        except TimeoutError:
            raise PeerLost(f"of {num_output} output tokens only {self._next_index} were delivered") from None

    async def _provide(self, index: int) -> None:
        """Have one image encoded and fetched by prefill; while that may help, encoded again elsewhere."""
        item = self._request.images[index].item
        avoid: set[WorkerId] = set()
        for attempt in range(1, MAX_ENCODES + 1):
            left, began_s = self._time_left(), self._now_s()
            async with self._stages.fleet.encoder(item, self._placed, avoid=frozenset(avoid), timeout_s=left) as encoder:
                try:
                    encoded = await self._encode(index, encoder)
                    await self._deliver(index, encoded, encoder)
                    return
                except EpdError as error:
                    self._request.timeline.add(f"failed: {error.code}", "encode", began_s, worker=encoder.worker)
                    if attempt == MAX_ENCODES or not self._may_encode_again(error):
                        raise
                    _log.warning("encoding again", request=self._request_id, item=index, worker=encoder.worker, reason=str(error))
                    avoid.add(encoder.worker)
            await asyncio.sleep(FIRST_BACKOFF_S * 2**attempt)

    async def _encode(self, index: int, encoder: Endpoint) -> Encoded:
        image = self._request.images[index]
        message = Encode(request_id=self._request_id, epoch=self._epoch, item=image.item, deadline_s=self._time_left())
        to, asked_s = Address(encoder.worker, "encode"), self._now_s()
        self._encoders.add(encoder.worker)
        answer = await self._stages.system.ask(to, message, (image.data,), timeout_s=message.deadline_s)
        if not isinstance(answer.message, Encoded):
            raise InternalError(f"encode answered {type(answer.message).__name__}")
        self._report(to, asked_s, answer.message.spans)
        return answer.message

    async def _deliver(self, index: int, encoded: Encoded, encoder: Endpoint) -> None:
        message = EmbeddingReady(
            request_id=self._request_id, epoch=self._epoch, item_index=index, ref=encoded.ref, endpoint=encoder
        )
        to, asked_s = self._at("prefill"), self._now_s()
        answer = await self._stages.system.ask(to, message, timeout_s=self._time_left())
        if not isinstance(answer.message, EmbeddingTaken):
            raise InternalError(f"prefill answered {type(answer.message).__name__}")
        self._report(to, asked_s, (Span("embedding transfer", 0.0, self._now_s() - asked_s),))
        self._num_delivered += 1

    def _may_encode_again(self, error: EpdError) -> bool:
        """Encoding again helps when an encode worker or its handle is at fault, and not when prefill has gone."""
        return error.retryable and self._stages.fleet.is_alive(self._placed.prefill.worker)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[None, None, None], *, role: str) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._placed.failed(role)
                if role != "encode":  # an image has been to several workers: it was none of them alone
                    self.suspect = self.suspect or self._at(role).worker
                self._events.put_nowait(error)

        self._tasks.append(asyncio.create_task(guarded(), name=f"attempt {self._request_id}#{self._epoch}"))
        return self._tasks[-1]

    def _report(self, to: Address, asked_s: float, spans: tuple[Span, ...]) -> None:
        self._request.timeline.add_reported(to.actor, to.worker, asked_s, spans)

    def _now_s(self) -> float:
        return self._request.timeline.now()

    def _on_token(self, index: int, token: Token) -> None:
        """They come in order, so that a gap will not be filled any more."""
        if index > self._next_index:
            self._events.put_nowait(PeerLost(f"output tokens {self._next_index} to {index - 1} were not delivered"))
            return
        self._next_index = index + 1
        self._events.put_nowait(OutputToken(index, token))
        if token.finish_reason:
            self._has_last.set()

    async def _abort(self, *stages: Address) -> None:
        message = Abort(request_id=self._request_id, epoch=self._epoch)
        for stage in stages:
            if not self._stages.fleet.is_alive(stage.worker):
                continue  # it drops what its lost link had asked, and dialling one that hangs takes time
            try:
                await self._stages.system.tell(stage, message, timeout_s=ABORT_TIMEOUT_S)
            except EpdError:
                continue  # that worker is gone, and what it held with it

    @property
    def _needs_decode(self) -> bool:
        return self._request.sampling.max_tokens - self._num_output > 1

    def _at(self, role: str) -> Address:
        endpoint = self._placed.prefill if role == "prefill" else self._placed.decode
        return Address(endpoint.worker, role)

    def _time_left(self) -> float:
        return max(0.001, self._deadline - self._stages.clock())
