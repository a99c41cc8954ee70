"""Which tokens of which prompts the next prefill step computes, and who holds which KV blocks meanwhile.

Steps: `plan` decides one, the runner computes it, `commit` books it. Chunks do not depend on what is drawn, so several steps may
be in flight, and they come back in order. What is in flight is scheduled and not computed: it is told to nobody, and its blocks
stay held, also when the request leaves, until every step that writes to them has come back. A prompt is cut into chunks under
the step's budget (`budget`) and runs up to the first image whose embedding is not there.

A failed step alters nothing. Its chunks are tried again by halves (`blame`) until one fails that is alone; chunks in flight that
follow a failed one are dropped as they land and planned anew.

Why nothing waits for ever:
 - Blocks. A request gets the blocks of its whole prompt when it is admitted, so a running request never waits for blocks.
   Requests that depend on another worker (an embedding is missing, decode has not reserved its blocks) are "stalled"; all stalled
   ones together are kept from the last `max_model_len` tokens' worth of blocks. So whoever depends on nobody gets its blocks in
   order of arrival, computes, hands over and gives them back, whatever the stalled ones wait for. As decode has its blocks before
   prefill counts on it, no circle goes through two workers but where decode reserves from the same pool: there, reservations
   whose prefill elsewhere has not begun give way to who has waited for long here (`num_blocks_short`).
 - Steps. Half of every budget belongs to the oldest request that can run, the rest goes to the one with the least left: short
   prompts pass long ones, and no prompt makes less than half of the speed it would have alone once those before it are done.
 - Prefixes. A request whose next block is being computed by another waits for that block instead of computing it twice; only
   waiting requests wait so, and only for running ones that can get there.

Owns: the requests, their block tables and the chains they are publishing. Does not know: bytes, devices, messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from epd.blame import Suspects
from epd.cache.block_pool import BlockPool, CachedPrefix
from epd.cache.prefix import block_hashes
from epd.errors import BadConfig, BadRequest, InternalError, StaleHandle
from epd.finish import finish_reason
from epd.prefill.budget import StepBudget
from epd.prefill.chains import Chains
from epd.prefill.config import PrefillConfig
from epd.prefill.integrity import Books, what_is_wrong
from epd.prefill.request import (
    FinishedBlocks,
    PrefillChunk,
    PrefillPlan,
    PrefillProgress,
    PrefillRequest,
    PrefillState,
    check_request,
)
from protocol.messages import RequestId, Token


@dataclass(frozen=True, slots=True)
class _Short:
    """Who is next, has to wait for blocks, and nobody passes."""

    request: PrefillRequest
    since: float
    num_blocks: int  # that it lacks


class PrefillScheduler:
    """A request is added once and leaves by `release` or `abort`."""

    def __init__(self, config: PrefillConfig, pool: BlockPool) -> None:
        self._config = config
        self._budget = StepBudget(config)
        self._pool = pool
        self._max_stalled_blocks = pool.num_blocks - config.num_blocks_of(config.max_model_len)
        if self._max_stalled_blocks < 0:
            raise BadConfig(
                f"a KV pool of {pool.num_blocks} blocks of {config.block_size} tokens cannot hold one request of "
                f"{config.max_model_len} tokens: enlarge the pool or lower the model length"
            )
        self._requests: dict[RequestId, PrefillRequest] = {}  # waiting, running and finished
        self._waiting: dict[RequestId, PrefillRequest] = {}  # in order of arrival
        self._running: dict[RequestId, PrefillRequest] = {}
        self._leaving: list[PrefillRequest] = []
        self._in_flight: deque[PrefillPlan] = deque()  # oldest first
        self._suspects: Suspects[PrefillChunk] = Suspects()
        self._chains = Chains()
        self._num_added = 0
        self._short: _Short | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def outstanding_tokens(self) -> int:
        return sum(request.num_tokens - request.num_computed_tokens for request in self._unfinished())

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: PrefillRequest) -> None:
        """Take a request in. A newer epoch of a known request replaces the older one.

        Raises:
            PromptTooLong, BadRequest: it can never run.
            StaleHandle: the same or a newer epoch is known.
        """
        check_request(request, self._config.max_model_len)
        known = self._requests.get(request.request_id)
        if known is not None and not self.abort(request.request_id, request.epoch - 1):
            raise StaleHandle(f"request {request.request_id} is known with epoch {known.epoch}, not before {request.epoch}")
        request.order = self._num_added
        self._num_added += 1
        request.hashes = block_hashes(request.token_ids, request.items, self._config.block_size, request.salt)
        # With room for one token only, nothing is decoded and nobody will ever say that decode is ready.
        if request.sampling.max_tokens - request.num_output_tokens <= 1 or request.num_tokens + 1 >= self._config.max_model_len:
            request.is_decode_ready = True
        self._requests[request.request_id] = self._waiting[request.request_id] = request

    def get(self, request_id: RequestId) -> PrefillRequest | None:
        return self._requests.get(request_id)

    def embedding_ready(self, request_id: RequestId, item_index: int) -> None:
        """An item's whole embedding is in this worker's own memory now; unknown requests are no error."""
        request = self._requests.get(request_id)
        if request is not None:
            if not 0 <= item_index < len(request.items):
                raise BadRequest(f"request {request_id} has no image {item_index}")
            request.has_embedding.add(item_index)

    def decode_ready(self, request_id: RequestId) -> None:
        """A decode worker has reserved its blocks and waits for ours; unknown requests are no error."""
        request = self._requests.get(request_id)
        if request is not None:
            request.is_decode_ready = True

    def needed_items(self, request_id: RequestId) -> tuple[int, ...]:
        """Indexes of the items with rows that are still to be computed.

        An item that leaves this answer never comes back: its embedding need not be fetched, or may be dropped. While a request
        waits, all items are needed, since the prefix cache may have evicted their KV by the time the request is admitted.
        """
        request = self._requests.get(request_id)
        if request is None:
            return ()
        computed = request.num_computed_tokens
        return tuple(index for index, item in enumerate(request.items) if item.offset + item.num_tokens > computed)

    def abort(self, request_id: RequestId, epoch: int | None = None) -> bool:
        """Forget a request, with `epoch` only up to that one. Blocks that a step in flight writes to are freed at its commit."""
        request = self._requests.get(request_id)
        if request is None or (epoch is not None and request.epoch > epoch):
            return False
        self._forget(request)
        if request.num_steps_in_flight:
            request.state = PrefillState.LEAVING
            self._leaving.append(request)
        else:
            self._free(request)
        return True

    def release(self, request_id: RequestId) -> None:
        """A finished request's blocks are no longer needed here; leases or decode on the same pool may hold them. Unknown
        requests are no error.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        self._require_finished(request)
        self._forget(request)
        self._free(request)

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Requests whose deadline has passed, for the caller to abort."""
        return tuple(request.request_id for request in self._requests.values() if request.deadline <= now)

    # --- steps ------------------------------------------------------------------------------------------------------

    @property
    def can_plan(self) -> bool:
        """Whether there may be one more step in flight."""
        return len(self._in_flight) < self._config.max_steps_in_flight

    def plan(self, now: float, *, num_beside: int = 0) -> PrefillPlan:
        """The next step; without chunks when there is nothing to compute.

        Args:
            num_beside: requests that decode on the same worker and pool. The step is kept short for their sake, and admissions
                leave a block free for each of them; where there are none a long prompt must not wait for blocks.
        """
        if not self.can_plan:
            raise InternalError(f"{len(self._in_flight)} prefill steps are not committed yet")
        reused: tuple[FinishedBlocks, ...] = ()
        if self._suspects:
            chunks = self._suspects.next(_is_next) if not self._in_flight else ()
        else:
            reused = self._admit(now, num_beside)
            runnable = [request for request in self._running.values() if request.is_runnable]
            chunks = self._budget.share(runnable, beside_decode=num_beside > 0)
        for chunk in chunks:
            chunk.request.num_scheduled_tokens = chunk.end
            chunk.request.num_steps_in_flight += 1
        plan = PrefillPlan(chunks, reused)
        if chunks:
            self._in_flight.append(plan)
        return plan

    def took(self, plan: PrefillPlan, seconds: float) -> None:
        """A planned step had the device for so long: those to come are cut accordingly."""
        self._budget.took(plan, seconds)

    def commit(self, plan: PrefillPlan, tokens: Sequence[Token | None]) -> tuple[PrefillProgress, ...]:
        """Book a computed step: `tokens[i]` is what chunk i sampled. Tells of requests that still exist."""
        if len(tokens) != len(plan.chunks):
            raise InternalError(f"{len(tokens)} outputs for {len(plan.chunks)} chunks")
        self._land(plan)
        progress = []
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            if _is_next(chunk):
                if chunk.samples != (token is not None):
                    raise InternalError(f"request {chunk.request.request_id}: a token is due at the end of the prompt only")
                progress.append(self._book(chunk, token))
        return tuple(progress)

    def retract(self, plan: PrefillPlan) -> tuple[PrefillRequest, ...]:
        """A step failed: its chunks are tried again, fewer at a time. Returns who is to blame for sure, and is aborted."""
        self._land(plan)
        suspects = [chunk for chunk in plan.chunks if _is_next(chunk)]
        for chunk in suspects:
            chunk.request.num_scheduled_tokens = chunk.start
        if len(plan.chunks) > 1:
            self._suspects.add(suspects)
            return ()
        for chunk in suspects:
            self.abort(chunk.request.request_id)
        return tuple(chunk.request for chunk in suspects)

    def num_blocks_short(self, now: float, patience_s: float) -> int:
        """How many blocks are lacking to go on, if that has been so for longer than that and nobody is being computed whose
        blocks will come back; else 0.
        """
        short = self._short
        if short is None or short.request.state is not PrefillState.WAITING or now < short.since + patience_s or self._in_flight:
            return 0
        return short.num_blocks

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
            self._chains.requests(),
            self._in_flight,
            self._config.block_size,
            self._config.max_steps_in_flight,
        )
        wrong = what_is_wrong(books)
        if wrong:
            raise InternalError("prefill scheduler: " + "; ".join(wrong))

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self, now: float, num_spare_blocks: int) -> tuple[FinishedBlocks, ...]:
        """Give blocks to waiting requests in order of arrival. Who cannot use them yet is passed over and keeps its place."""
        was_short, self._short = self._short, None
        admitted: list[FinishedBlocks] = []
        num_runnable = sum(request.is_runnable for request in self._running.values())
        num_stalled_blocks = self._num_stalled_blocks()
        for request in list(self._waiting.values()):
            if num_runnable >= self._config.max_running:
                break
            cached = self._pool.peek(self._reusable_hashes(request))
            start = cached.num_blocks * self._config.block_size
            num_blocks = self._config.num_blocks_of(request.num_tokens)
            is_stalled = request.is_stalled(start)
            if request.runnable_until(start) == start or self._is_computed_by_another(request, cached):
                continue
            if is_stalled and num_stalled_blocks + num_blocks > self._max_stalled_blocks:
                continue
            num_lacking = num_blocks - cached.num_blocks - (self._pool.num_free - cached.num_evictable - num_spare_blocks)
            if num_lacking > 0:
                since = was_short.since if was_short is not None and was_short.request is request else now
                self._short = _Short(request, since, num_lacking)
                break
            self._start(request, now)
            num_runnable += 1
            num_stalled_blocks += num_blocks if is_stalled else 0
            if cached.num_blocks:
                admitted.append(self._tell_blocks(request))
        return tuple(admitted)

    def _start(self, request: PrefillRequest, now: float) -> None:
        table = self._pool.lookup(self._reusable_hashes(request))
        num_cached_blocks = len(table)
        fresh = self._pool.allocate(self._config.num_blocks_of(request.num_tokens) - num_cached_blocks)
        if fresh is None:
            raise InternalError("the KV pool promised blocks that it does not have")
        request.block_table = table + fresh
        request.num_cached_tokens = num_cached_blocks * self._config.block_size
        request.num_computed_tokens = request.num_scheduled_tokens = request.num_cached_tokens
        request.admitted_at = now
        request.state = PrefillState.RUNNING
        del self._waiting[request.request_id]
        self._running[request.request_id] = request
        self._chains.begin(request, request.hashes[num_cached_blocks:])

    def _reusable_hashes(self, request: PrefillRequest) -> tuple[int, ...]:
        """The last token is always computed: its logits are what prefill is for."""
        return request.hashes[: (request.num_tokens - 1) // self._config.block_size]

    def _is_computed_by_another(self, request: PrefillRequest, cached: CachedPrefix) -> bool:
        """Whether a running request is about to compute the first block that the cache lacks."""
        hashes = self._reusable_hashes(request)
        if cached.num_blocks >= len(hashes):
            return False
        return self._chains.is_coming(hashes[cached.num_blocks], (cached.num_blocks + 1) * self._config.block_size)

    def _num_stalled_blocks(self) -> int:
        return sum(
            len(request.block_table)
            for request in self._requests.values()
            if request.block_table and request.is_stalled(request.num_computed_tokens)
        )

    # --- booking ----------------------------------------------------------------------------------------------------

    def _land(self, plan: PrefillPlan) -> None:
        """Count a step's end; who has left gives its blocks back with the last of its steps."""
        if not plan.chunks:
            return
        if not self._in_flight or plan is not self._in_flight[0]:
            raise InternalError("prefill steps were committed out of order")
        self._in_flight.popleft()
        for chunk in plan.chunks:
            request = chunk.request
            request.num_steps_in_flight -= 1
            if request.state is PrefillState.LEAVING and not request.num_steps_in_flight:
                self._leaving.remove(request)
                self._free(request)

    def _book(self, chunk: PrefillChunk, token: Token | None) -> PrefillProgress:
        request = chunk.request
        first_full = request.num_computed_tokens // self._config.block_size
        request.num_computed_tokens = chunk.end
        for place in range(first_full, chunk.end // self._config.block_size):
            self._pool.cache(request.block_table[place], request.hashes[place])
        self._chains.end(request, request.hashes[first_full : chunk.end // self._config.block_size])
        if token is not None:
            del self._running[request.request_id]
            request.state = PrefillState.FINISHED
            token = msgspec.structs.replace(token, finish_reason=self._finish_reason(request, token))
        blocks = self._tell_blocks(request)
        return PrefillProgress(request, blocks if blocks.block_ids else None, token)

    def _tell_blocks(self, request: PrefillRequest) -> FinishedBlocks:
        """The blocks that have become complete since the last time, with the partly filled last one at the end."""
        first = request.num_told_blocks
        is_finished = request.num_computed_tokens == request.num_tokens
        end = len(request.block_table) if is_finished else request.num_computed_tokens // self._config.block_size
        request.num_told_blocks = end
        return FinishedBlocks(request, first, tuple(request.block_table[first:end]))

    def _finish_reason(self, request: PrefillRequest, token: Token) -> str:
        return finish_reason(
            token.token_id,
            num_output=request.num_output_tokens + 1,
            num_tokens=request.num_tokens + 1,
            sampling=request.sampling,
            eos_token_ids=self._config.eos_token_ids,
            max_model_len=self._config.max_model_len,
        )

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _forget(self, request: PrefillRequest) -> None:
        del self._requests[request.request_id]
        self._waiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)
        self._chains.end(request, request.hashes[request.num_computed_tokens // self._config.block_size :])

    def _free(self, request: PrefillRequest) -> None:
        self._pool.free(request.block_table)
        request.block_table = []
        request.state = PrefillState.GONE

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _require_finished(self, request: PrefillRequest) -> None:
        if request.state is not PrefillState.FINISHED:
            raise InternalError(f"request {request.request_id} is {request.state.name.lower()}, not finished")

    def _unfinished(self) -> Iterable[PrefillRequest]:
        yield from self._waiting.values()
        yield from self._running.values()


def _is_next(chunk: PrefillChunk) -> bool:
    """Whether a chunk goes on where its request has got to: false when it has left, or a chunk before has failed."""
    return chunk.request.state is PrefillState.RUNNING and chunk.start == chunk.request.num_computed_tokens
