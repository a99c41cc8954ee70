"""Which sequences the next decode step feeds, and who holds which KV blocks meanwhile.

A request waits until the pool has room for its prompt (`reserve`, in order of arrival), receives its KV while prefill works,
runs from its handoff on, and leaves by its last token, by `abort`, or preempted. When the pool is full the running request that
arrived last gives way: it is reported in the plan and prefilled again somewhere with what it has so far.

Why nothing waits for ever: the oldest running request is never preempted. With nobody left to preempt it sits out steps until
receiving requests (or prefills on a shared pool) become running ones, which they do without needing another decode block; and
alone it fits, as the pool holds `max_model_len` tokens. So it finishes, and the next is the oldest. A reservation has room for
one token more than the prompt and leaves one free block per earlier request, so that every visit makes progress.

Owns: the requests and their block tables. Does not know: bytes, devices, messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from epd.cache.block_pool import BlockPool
from epd.cache.prefix import block_hashes
from epd.decode.request import DecodeOutput, DecodePlan, DecodeRequest, DecodeState, DecodeStep, Reservation
from epd.errors import BadConfig, BadRequest, InternalError, PromptTooLong, StaleHandle
from epd.finish import finish_reason
from protocol.messages import RequestId, Token


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    block_size: int
    max_running: int  # requests in one step
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()


class DecodeScheduler:
    """At most one plan is out at a time: the next step feeds what the last one drew."""

    def __init__(self, config: DecodeConfig, pool: BlockPool) -> None:
        if min(config.block_size, config.max_running) < 1:
            raise BadConfig("decode limits must be at least 1")
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
        self._in_flight: DecodePlan | None = None
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

    def get(self, request_id: RequestId) -> DecodeRequest | None:
        return self._requests.get(request_id)

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

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Requests whose deadline has passed, for the caller to abort."""
        return tuple(request.request_id for request in self._requests.values() if request.deadline <= now)

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self) -> DecodePlan:
        """The next step: the oldest running requests, each with a block for its next token.

        Without steps when nothing can run; that may change whenever a request comes, leaves or gives blocks back. A plan with
        steps must be committed or failed before the next one.
        """
        if self._in_flight is not None:
            raise InternalError("the last decode step is not committed yet")
        preempted: list[DecodeRequest] = []
        steps = []
        for request in sorted(self._running.values(), key=lambda request: request.order)[: self._config.max_running]:
            if request.state is DecodeState.RUNNING and self._make_room(request, preempted):
                position = request.num_computed_tokens
                steps.append(DecodeStep(request, int(request.buffer[position]), position))
        for step in steps:
            step.request.num_steps_in_flight += 1
        plan = DecodePlan(tuple(steps), tuple(preempted))
        self._in_flight = plan if steps else None
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

    def fail(self, plan: DecodePlan) -> tuple[DecodeRequest, ...]:
        """A step did not run: its requests are aborted. Returns those that still existed."""
        failed = [request for request in self._land(plan) if request is not None]
        for request in failed:
            self._leave(request)
        return tuple(failed)

    # --- proof ------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Sequence[int]]:
        """All block tables held here, for the pool's check_integrity()."""
        return [request.block_table for request in (*self._requests.values(), *self._leaving)]

    def is_idle(self) -> bool:
        return not self._requests and not self._leaving

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        wrong = [*self._wrong_indexes(), *(text for request in self._requests.values() for text in self._wrong_numbers(request))]
        if wrong:
            raise InternalError("decode scheduler: " + "; ".join(wrong))

    def _wrong_indexes(self) -> Iterable[str]:
        for state, index in ((DecodeState.WAITING, self._waiting), (DecodeState.RUNNING, self._running)):
            if index.keys() != {key for key, request in self._requests.items() if request.state is state}:
                yield f"the index of {state.name} requests is wrong"
        if any(request.state is not DecodeState.LEAVING or not request.num_steps_in_flight for request in self._leaving):
            yield "a request stays without a step in flight"

    def _wrong_numbers(self, request: DecodeRequest) -> Iterable[str]:
        num_blocks = len(request.block_table)
        match request.state:
            case DecodeState.WAITING:
                is_right = num_blocks == 0
            case DecodeState.RECEIVING:
                is_right = num_blocks == self._num_blocks_of(request.num_tokens + 1)
            case _:
                is_right = request.num_computed_tokens == request.num_tokens - 1 and num_blocks >= self._num_blocks_of(
                    request.num_computed_tokens
                )
        if not is_right:
            numbers = (request.num_computed_tokens, request.num_tokens, num_blocks)
            yield f"{request.request_id}, {request.state.name}: computed tokens, tokens and blocks are {numbers}"

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _make_room(self, request: DecodeRequest, preempted: list[DecodeRequest]) -> bool:
        """A block for the request's next token, at the cost of later arrivals if need be. False: it cannot run now."""
        while request.num_computed_tokens >= len(request.block_table) * self._config.block_size:
            fresh = self._pool.allocate(1)
            if fresh is not None:
                request.block_table += fresh
                continue
            if len(self._running) == 1:
                return False
            victim = max(self._running.values(), key=lambda running: running.order)
            self._leave(victim)
            self.num_preemptions += 1
            preempted.append(victim)
            if victim is request:
                return False
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
        """Count a step's end; per sequence its request, or None where it has left. Who left gives its blocks back now."""
        if plan is not self._in_flight and plan.steps:
            raise InternalError("this decode step is not in flight")
        self._in_flight = None
        landed: list[DecodeRequest | None] = []
        for step in plan.steps:
            request = step.request
            request.num_steps_in_flight -= 1
            if request.state is DecodeState.LEAVING:
                self._leaving.remove(request)
                self._free(request)
            landed.append(request if request.state is DecodeState.RUNNING else None)
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
