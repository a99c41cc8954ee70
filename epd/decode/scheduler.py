"""Which sequences the next decode step feeds, and who holds which KV blocks meanwhile.

A request waits until the pool has room for its prompt (`reserve`, in order of arrival), receives its KV while prefill works,
runs from its handoff on, and leaves by its last token, by `abort`, or preempted. When the pool is full the running request that
arrived last gives way: it is reported in the plan and prefilled again somewhere with what it has so far.

Why nothing waits for ever: the oldest running request is never preempted. With nobody left to preempt it sits out steps until
receiving requests (or prefills on a shared pool) become running ones, which they do without needing another decode block; and
alone it fits, as the pool holds `max_model_len` tokens. So it finishes, and the next is the oldest. A reservation has room for
one token more than the prompt and leaves one free block per earlier request, so that every visit makes progress.

Steps in flight. A second plan may be made while one is out, so that a device has its next step before it is done with the last:
 - A request in the plan that is out is taken to go on: its next step feeds PENDING. What is certain to end it is known (the
   longest output, the longest context); what is not (a stop token, an abort) makes its next step's token surplus, which is
   dropped. Blocks of who has left stay held until every step that writes to them has come back.
 - Penalties need every token before the one that is drawn, so such a request sits out while its last one is PENDING, at half its
   speed. Where more than MAX_SITTING_OUT of a batch would, all of it waits for the step that is out instead: then the time
   between two steps is lost to all, which is less than what half of the steps are to the few.
 - Nobody is preempted while a step is in flight. It may itself free what is wanted, and a victim's blocks would stay held: the
   next plan is empty, and the one after it decides.
 - A failed step alters nothing. Its requests go back to where they were, what was fed from it is dropped as it lands, and they
   are tried again by halves (`blame`) until one fails that is alone.

Owns: the requests and their block tables. Does not know: bytes, devices, messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from epd.blame import Suspects
from epd.cache.block_pool import BlockPool
from epd.cache.prefix import block_hashes
from epd.decode.integrity import Books, what_is_wrong
from epd.decode.request import DecodeOutput, DecodePlan, DecodeRequest, DecodeState, DecodeStep, Reservation
from epd.errors import BadConfig, BadRequest, InternalError, PromptTooLong, StaleHandle
from epd.finish import finish_reason
from epd.step import PENDING
from protocol.messages import RequestId, Token

MAX_SITTING_OUT = 1 / 8  # of a batch


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    block_size: int
    max_running: int  # requests in one step
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_steps_in_flight: int = 1  # 1: a step is planned when the last one is known; 2: one step ahead


class DecodeScheduler:
    """Plans are committed, or retracted, in the order in which they were made."""

    def __init__(self, config: DecodeConfig, pool: BlockPool) -> None:
        if min(config.block_size, config.max_running) < 1:
            raise BadConfig("decode limits must be at least 1")
        if config.max_steps_in_flight not in (1, 2):  # a third would have to feed what a step before the last one drew
            raise BadConfig(f"decode has one or two steps in flight, not {config.max_steps_in_flight}")
        if pool.num_blocks * config.block_size < config.max_model_len:
            raise BadConfig(
                f"a KV pool of {pool.num_blocks} blocks of {config.block_size} tokens cannot hold one request of "
                f"{config.max_model_len} tokens: enlarge the pool or lower the model length"
            )
        self.num_preemptions = 0
        self._config = config
        self._pool = pool
        self._requests: dict[RequestId, DecodeRequest] = {}  # waiting, receiving and running
        self._waiting: dict[RequestId, DecodeRequest] = {}  # in order of arrival
        self._running: dict[RequestId, DecodeRequest] = {}
        self._leaving: list[DecodeRequest] = []
        self._in_flight: deque[DecodePlan] = deque()  # oldest first
        self._suspects: Suspects[DecodeRequest] = Suspects()
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_receiving(self) -> int:
        return len(self._requests) - len(self._waiting) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: DecodeRequest) -> None:
        """Queue a request for `reserve`. A newer epoch of a known request replaces the older one.

        Raises:
            PromptTooLong, BadRequest: it can never run.
            StaleHandle: the same or a newer epoch is known.
        """
        self._enter(request)
        self._waiting[request.request_id] = request

    def adopt(self, request: DecodeRequest, block_table: Sequence[int], token: Token) -> bool:
        """Take over a finished prefill's block table, with its references, on a shared pool. False when `token` ends the output.

        Raises:
            As add(), and then the table still belongs to the caller.
        """
        self._enter(request)
        request.block_table = list(block_table)
        if len(block_table) < self._num_blocks_of(request.num_tokens):
            self._forget(request)
            raise InternalError(f"{request.request_id}: {len(block_table)} blocks cannot hold {request.num_tokens} tokens")
        return self._run(request, token)

    def reserve(self) -> tuple[Reservation, ...]:
        """Give blocks to waiting requests in order of arrival, as far as the pool has room."""
        reserved = []
        for request in list(self._waiting.values()):
            cached = self._pool.peek(request.hashes)
            num_fresh = self._num_blocks_of(request.num_tokens + 1) - cached.num_blocks
            num_holders = len(self._requests) - len(self._waiting)
            if num_fresh > self._pool.num_free - cached.num_evictable - num_holders:
                break
            table = self._pool.lookup(request.hashes)
            fresh = self._pool.allocate(num_fresh)
            if fresh is None:
                raise InternalError("the KV pool promised blocks that it does not have")
            request.num_cached_blocks = request.num_published_blocks = len(table)
            request.block_table = table + fresh
            request.state = DecodeState.RECEIVING
            del self._waiting[request.request_id]
            pulled = request.block_table[len(table) : self._num_blocks_of(request.num_tokens)]
            reserved.append(Reservation(request, len(table), tuple(pulled)))
        return tuple(reserved)

    def handoff(self, request_id: RequestId, num_tokens: int, token: Token) -> bool:
        """All KV of a receiving request is in its blocks, and `token` is the first to feed. False when `token` ends the output.

        Raises:
            StaleHandle: the KV is of another number of tokens, or the request is not receiving. Nothing has changed.
        """
        request = self._requests.get(request_id)
        if request is None or request.state is not DecodeState.RECEIVING:
            raise StaleHandle(f"request {request_id} is not waiting for a handoff")
        if num_tokens != request.num_tokens:
            raise StaleHandle(f"request {request_id}: KV of {num_tokens} tokens came, {request.num_tokens} were asked for")
        return self._run(request, token)

    def abort(self, request_id: RequestId, epoch: int | None = None) -> bool:
        """Forget a request, with `epoch` only up to that one. Whoever pulls into its blocks must have stopped before.

        Blocks that a step in flight writes to are freed at its commit.
        """
        request = self._requests.get(request_id)
        if request is None or (epoch is not None and request.epoch > epoch):
            return False
        self._leave(request)
        return True

    # --- steps ------------------------------------------------------------------------------------------------------

    @property
    def can_plan(self) -> bool:
        """Whether there may be one more step in flight."""
        return len(self._in_flight) < self._config.max_steps_in_flight

    def plan(self) -> DecodePlan:
        """The next step: the oldest running requests, each with a block for its next token.

        Without steps when nothing can run; that may change whenever a request comes, leaves or gives blocks back, and when a step
        comes back. A plan with steps must be committed or retracted.
        """
        if not self.can_plan:
            raise InternalError(f"{len(self._in_flight)} decode steps are not committed yet")
        preempted: list[DecodeRequest] = []
        requests: Sequence[DecodeRequest]
        if self._suspects:
            requests = self._suspects.next(_is_running) if not self._in_flight else ()
        else:
            requests = self._with_room(self._candidates(), preempted)
        steps = tuple(_step(request) for request in requests)
        for request in requests:
            request.expect()
            request.num_steps_in_flight += 1
        plan = DecodePlan(steps, tuple(preempted))
        if steps:
            self._in_flight.append(plan)
        return plan

    def commit(self, plan: DecodePlan, tokens: Sequence[Token | None]) -> tuple[DecodeOutput, ...]:
        """Book a computed step: `tokens[i]` is what step i drew. Tells of requests that still exist."""
        if len(tokens) != len(plan.steps):
            raise InternalError(f"{len(tokens)} tokens for {len(plan.steps)} sequences")
        outputs = []
        for request, token in zip(self._land(plan), tokens, strict=True):
            if request is None:
                continue
            if token is None:
                raise InternalError(f"request {request.request_id}: the decode step drew no token")
            request.num_computed_tokens += 1
            self._publish(request)
            token = self._append(request, token)
            outputs.append(DecodeOutput(request, request.num_output_tokens - 1, token))
            if token.finish_reason:
                self._leave(request)
        return tuple(outputs)

    def retract(self, plan: DecodePlan) -> tuple[DecodeRequest, ...]:
        """A step failed: its requests are tried again, fewer at a time. Returns who is to blame for sure, and is aborted."""
        suspects = [request for request in self._land(plan) if request is not None]
        if len(plan.steps) > 1:
            self._suspects.add(suspects)
            return ()
        for request in suspects:
            self._leave(request)
        return tuple(suspects)

    # --- proof ------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Sequence[int]]:
        """All block tables held here, for the pool's check_integrity()."""
        return [request.block_table for request in (*self._requests.values(), *self._leaving)]

    def is_idle(self) -> bool:
        return not self._requests and not self._leaving and not self._in_flight

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        books = Books(
            tuple(self._requests.values()),
            self._waiting.keys(),
            self._running.keys(),
            self._leaving,
            self._in_flight,
            self._config.block_size,
            self._config.max_steps_in_flight,
        )
        wrong = what_is_wrong(books)
        if wrong:
            raise InternalError("decode scheduler: " + "; ".join(wrong))

    # --- who runs next ----------------------------------------------------------------------------------------------

    def _candidates(self) -> list[DecodeRequest]:
        """The oldest running requests whose next step can be described now."""
        going_on = [request for request in self._running.values() if not self._ends_in_flight(request)]
        able = [request for request in going_on if not (request.num_steps_in_flight and request.needs_history)]
        if len(going_on) - len(able) > len(going_on) * MAX_SITTING_OUT:
            return []
        return sorted(able, key=lambda request: request.order)[: self._config.max_running]

    def _ends_in_flight(self, request: DecodeRequest) -> bool:
        """Whether a step in flight is certain to draw the request's last token."""
        num_more = request.num_steps_in_flight
        return (
            request.num_output_tokens + num_more >= request.sampling.max_tokens
            or request.num_tokens + num_more >= self._config.max_model_len
        )

    def _with_room(self, requests: Sequence[DecodeRequest], preempted: list[DecodeRequest]) -> Sequence[DecodeRequest]:
        """Of `requests`, oldest first, those that have a block for their next token."""
        if self._in_flight:
            return requests if all(self._extend(request) for request in requests) else ()
        return [request for request in requests if _is_running(request) and self._make_room(request, preempted)]

    def _make_room(self, request: DecodeRequest, preempted: list[DecodeRequest]) -> bool:
        """A block for the request's next token, at the cost of later arrivals if need be. False: it cannot run now."""
        while not self._extend(request):
            if len(self._running) == 1:
                return False
            victim = max(self._running.values(), key=lambda running: running.order)
            self._leave(victim)
            self.num_preemptions += 1
            preempted.append(victim)
            if victim is request:
                return False
        return True

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _extend(self, request: DecodeRequest) -> bool:
        """See to a block for the request's next token; False when the pool has none."""
        if request.next_position >= len(request.block_table) * self._config.block_size:
            fresh = self._pool.allocate(1)
            if fresh is None:
                return False
            request.block_table += fresh
        return True

    def _publish(self, request: DecodeRequest) -> None:
        """Offer the blocks that have become full to the prefix cache."""
        num_full = request.num_computed_tokens // self._config.block_size
        if num_full == request.num_published_blocks:
            return
        tokens = request.buffer[: num_full * self._config.block_size]
        request.hashes = block_hashes(tokens, request.items, self._config.block_size, request.salt, known=request.hashes)
        for place in range(request.num_published_blocks, num_full):
            self._pool.cache(request.block_table[place], request.hashes[place])
        request.num_published_blocks = num_full

    # --- entering and leaving ---------------------------------------------------------------------------------------

    def _enter(self, request: DecodeRequest) -> None:
        num_tokens = len(request.token_ids)
        if not 0 < request.num_prompt_tokens <= num_tokens:
            raise BadRequest(f"request {request.request_id}: {request.num_prompt_tokens} prompt tokens of {num_tokens}")
        if num_tokens >= self._config.max_model_len:
            raise PromptTooLong(
                f"{num_tokens} tokens leave no room for output; the model's context is {self._config.max_model_len}"
            )
        known = self._requests.get(request.request_id)
        if known is not None and not self.abort(request.request_id, request.epoch - 1):
            raise StaleHandle(f"request {request.request_id} is known with epoch {known.epoch}, not before {request.epoch}")
        request.order = self._num_added
        self._num_added += 1
        num_new = max(1, request.sampling.max_tokens - (num_tokens - request.num_prompt_tokens))
        request.buffer = np.empty(min(self._config.max_model_len, num_tokens + num_new), np.int32)
        request.buffer[:num_tokens] = request.token_ids
        request.num_tokens = num_tokens
        request.hashes = block_hashes(request.token_ids, request.items, self._config.block_size, request.salt)
        self._requests[request.request_id] = request

    def _run(self, request: DecodeRequest, token: Token) -> bool:
        request.num_computed_tokens = request.num_tokens
        request.state = DecodeState.RUNNING
        self._running[request.request_id] = request
        self._publish(request)
        if self._append(request, token).finish_reason:
            self._leave(request)
            return False
        return True

    def _append(self, request: DecodeRequest, token: Token) -> Token:
        request.append(token.token_id)
        reason = finish_reason(
            token.token_id,
            num_output=request.num_output_tokens,
            num_tokens=request.num_tokens,
            sampling=request.sampling,
            eos_token_ids=self._config.eos_token_ids,
            max_model_len=self._config.max_model_len,
        )
        return msgspec.structs.replace(token, finish_reason=reason)

    def _land(self, plan: DecodePlan) -> list[DecodeRequest | None]:
        """Count a step's end. Per sequence its request, or None where what was drawn is surplus: the request has left, or the
        step that was to draw what was fed has failed.
        """
        if not plan.steps:
            return []
        if not self._in_flight or plan is not self._in_flight[0]:
            raise InternalError("this decode step is not in flight, or not the oldest that is")
        self._in_flight.popleft()
        landed: list[DecodeRequest | None] = []
        for step in plan.steps:
            request = step.request
            request.num_steps_in_flight -= 1
            if request.state is DecodeState.LEAVING and not request.num_steps_in_flight:
                self._leaving.remove(request)
                self._free(request)
            is_next = _is_running(request) and step.position == request.num_computed_tokens
            landed.append(request if is_next else None)
        return landed

    def _leave(self, request: DecodeRequest) -> None:
        self._forget(request)
        if request.num_steps_in_flight:
            request.state = DecodeState.LEAVING
            self._leaving.append(request)
        else:
            self._free(request)

    def _forget(self, request: DecodeRequest) -> None:
        del self._requests[request.request_id]
        self._waiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)

    def _free(self, request: DecodeRequest) -> None:
        self._pool.free(request.block_table)
        request.block_table = []
        request.state = DecodeState.GONE

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)


def _is_running(request: DecodeRequest) -> bool:
    return request.state is DecodeState.RUNNING


def _step(request: DecodeRequest) -> DecodeStep:
    position = request.next_position
    return DecodeStep(request, PENDING if request.num_steps_in_flight else int(request.buffer[position]), position)
