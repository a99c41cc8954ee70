"""Which tokens of which prompts the next prefill step computes, and who holds which KV blocks meanwhile.

Steps: `plan` decides one, the runner computes it, `commit` books it. Several may be planned before the first is committed, as
long as they are committed in order. A prompt is cut into chunks under the step's token budget and runs up to the first image
whose embedding is not there.

Why nothing waits for ever:
 - Blocks. A request gets the blocks of its whole prompt when it is admitted, so a running request never waits for blocks.
   Requests that depend on another worker (an embedding is missing, decode has not reserved its blocks) are "stalled"; all stalled
   ones together are kept from the last `max_model_len` tokens' worth of blocks. So whoever depends on nobody gets its blocks in
   order of arrival, computes, hands over and gives them back, whatever the stalled ones wait for. As decode has its blocks before
   prefill counts on it, no circle goes through two workers.
 - Steps. Half of every budget belongs to the oldest request that can run, the rest goes to the one with the least left: short
   prompts pass long ones, and no prompt makes less than half of the speed it would have alone once those before it are done.
 - Prefixes. A request whose next block is being computed by another waits for that block instead of computing it twice; only
   waiting requests wait so, and only for running ones that can get there.

Owns: the requests, their block tables and the chains they are publishing. Does not know: bytes, devices, messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from epd.cache.block_pool import BlockPool, CachedPrefix
from epd.cache.prefix import block_hashes
from epd.errors import BadConfig, BadRequest, InternalError, PromptTooLong, StaleHandle
from epd.finish import finish_reason
from epd.prefill.request import (
    FinishedBlocks,
    PrefillChunk,
    PrefillPlan,
    PrefillProgress,
    PrefillRequest,
    PrefillState,
    check_items,
)
from protocol.messages import RequestId, Token


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    block_size: int
    token_budget: int  # new tokens in one step, at most
    max_chunk_tokens: int  # of one request in one step
    max_running: int  # requests in one step
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()


class PrefillScheduler:
    """A request is added once and leaves by `release` or `abort`."""

    def __init__(self, config: PrefillConfig, pool: BlockPool) -> None:
        if min(config.block_size, config.token_budget, config.max_chunk_tokens, config.max_running) < 1:
            raise BadConfig("prefill limits must be at least 1")
        self._config = config
        self._pool = pool
        self._max_stalled_blocks = pool.num_blocks - self._num_blocks_of(config.max_model_len)
        if self._max_stalled_blocks < 0:
            raise BadConfig(
                f"a KV pool of {pool.num_blocks} blocks of {config.block_size} tokens cannot hold one request of "
                f"{config.max_model_len} tokens: enlarge the pool or lower the model length"
            )
        self._requests: dict[RequestId, PrefillRequest] = {}  # waiting, running and finished
        self._waiting: dict[RequestId, PrefillRequest] = {}  # in order of arrival
        self._running: dict[RequestId, PrefillRequest] = {}
        self._leaving: list[PrefillRequest] = []
        self._computing: dict[int, PrefillRequest] = {}  # hash of a block that is not there yet -> who computes it
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_held(self) -> int:
        """Requests that are done here and whose blocks nobody has released yet."""
        return len(self._requests) - len(self._waiting) - len(self._running)

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
        self._check(request)
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

    def plan(self, now: float, *, spare_blocks: int = 0) -> PrefillPlan:
        """The next step; without chunks when there is nothing to compute.

        Args:
            spare_blocks: admissions leave that many blocks free, for a decode scheduler on the same pool. It must be 0 when
                decode holds no blocks, or a long prompt would wait for ever.
        """
        reused = self._admit(now, spare_blocks)
        chunks = self._share_budget()
        for chunk in chunks:
            chunk.request.num_scheduled_tokens = chunk.end
            chunk.request.num_steps_in_flight += 1
        return PrefillPlan(chunks, reused)

    def commit(self, plan: PrefillPlan, tokens: Sequence[Token | None]) -> tuple[PrefillProgress, ...]:
        """Book a computed step: `tokens[i]` is what chunk i sampled. Tells of requests that still exist."""
        if len(tokens) != len(plan.chunks):
            raise InternalError(f"{len(tokens)} outputs for {len(plan.chunks)} chunks")
        progress = []
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            if self._is_still_here(chunk):
                if chunk.samples != (token is not None):
                    raise InternalError(f"request {chunk.request.request_id}: a token is due at the end of the prompt only")
                progress.append(self._book(chunk, token))
        return tuple(progress)

    def fail(self, plan: PrefillPlan) -> tuple[PrefillRequest, ...]:
        """A step did not run: its requests are aborted. Returns those that still existed."""
        failed = []
        for chunk in plan.chunks:
            if self._is_still_here(chunk):
                self.abort(chunk.request.request_id)
                failed.append(chunk.request)
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
            raise InternalError("prefill scheduler: " + "; ".join(wrong))

    def _wrong_indexes(self) -> Iterable[str]:
        for state, index in ((PrefillState.WAITING, self._waiting), (PrefillState.RUNNING, self._running)):
            if index.keys() != {key for key, request in self._requests.items() if request.state is state}:
                yield f"the index of {state.name} requests is wrong"
        if any(request.state is not PrefillState.LEAVING or not request.num_steps_in_flight for request in self._leaving):
            yield "a request stays without a step in flight"
        if any(request.state is not PrefillState.RUNNING for request in self._computing.values()):
            yield "a block is waited for that nobody computes"

    def _wrong_numbers(self, request: PrefillRequest) -> Iterable[str]:
        numbers = (request.num_cached_tokens, request.num_computed_tokens, request.num_scheduled_tokens, request.num_tokens)
        if list(numbers) != sorted(numbers):
            yield f"{request.request_id}: cached, computed, scheduled and all tokens are {numbers}"
        num_due = 0 if request.state is PrefillState.WAITING else self._num_blocks_of(request.num_tokens)
        if len(request.block_table) != num_due:
            yield f"{request.request_id}: {len(request.block_table)} blocks held, {num_due} due"
        if request.state is PrefillState.FINISHED and request.num_computed_tokens != request.num_tokens:
            yield f"{request.request_id}: finished with {request.num_computed_tokens} of {request.num_tokens} tokens"

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit(self, now: float, spare_blocks: int) -> tuple[FinishedBlocks, ...]:
        """Give blocks to waiting requests in order of arrival. Who cannot use them yet is passed over and keeps its place."""
        admitted: list[FinishedBlocks] = []
        num_runnable = sum(request.is_runnable for request in self._running.values())
        num_stalled_blocks = self._num_stalled_blocks()
        for request in list(self._waiting.values()):
            if num_runnable >= self._config.max_running:
                break
            cached = self._pool.peek(self._reusable_hashes(request))
            start = cached.num_blocks * self._config.block_size
            num_blocks = self._num_blocks_of(request.num_tokens)
            is_stalled = request.is_stalled(start)
            if request.runnable_until(start) == start or self._is_computed_by_another(request, cached):
                continue
            if is_stalled and num_stalled_blocks + num_blocks > self._max_stalled_blocks:
                continue
            if num_blocks - cached.num_blocks > self._pool.num_free - cached.num_evictable - spare_blocks:
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
        fresh = self._pool.allocate(self._num_blocks_of(request.num_tokens) - num_cached_blocks)
        if fresh is None:
            raise InternalError("the KV pool promised blocks that it does not have")
        request.block_table = table + fresh
        request.num_cached_tokens = num_cached_blocks * self._config.block_size
        request.num_computed_tokens = request.num_scheduled_tokens = request.num_cached_tokens
        request.admitted_at = now
        request.state = PrefillState.RUNNING
        del self._waiting[request.request_id]
        self._running[request.request_id] = request
        for block_hash in request.hashes[num_cached_blocks:]:
            self._computing.setdefault(block_hash, request)

    def _reusable_hashes(self, request: PrefillRequest) -> tuple[int, ...]:
        """The last token is always computed: its logits are what prefill is for."""
        return request.hashes[: (request.num_tokens - 1) // self._config.block_size]

    def _is_computed_by_another(self, request: PrefillRequest, cached: CachedPrefix) -> bool:
        """Whether a running request is about to compute the first block that the cache lacks."""
        hashes = self._reusable_hashes(request)
        if cached.num_blocks >= len(hashes):
            return False
        other = self._computing.get(hashes[cached.num_blocks])
        if other is None:
            return False
        return other.runnable_until(other.num_computed_tokens) >= (cached.num_blocks + 1) * self._config.block_size

    def _num_stalled_blocks(self) -> int:
        return sum(
            len(request.block_table)
            for request in self._requests.values()
            if request.block_table and request.is_stalled(request.num_computed_tokens)
        )

    # --- the budget -------------------------------------------------------------------------------------------------

    def _share_budget(self) -> tuple[PrefillChunk, ...]:
        """Half of the budget to the oldest runnable request, then all that is left by least work left."""
        runnable = [request for request in self._running.values() if request.is_runnable]
        if not runnable:
            return ()
        oldest = min(runnable, key=lambda request: request.order)
        ends: dict[PrefillRequest, int] = {}
        left = self._config.token_budget
        left -= self._extend(ends, oldest, (left + 1) // 2)
        for request in sorted(runnable, key=lambda request: (request.num_tokens - request.num_scheduled_tokens, request.order)):
            if left and (request in ends or len(ends) < self._config.max_running):
                left -= self._extend(ends, request, left)
        return tuple(
            PrefillChunk(request, request.num_scheduled_tokens, end - request.num_scheduled_tokens, end == request.num_tokens)
            for request, end in ends.items()
        )

    def _extend(self, ends: dict[PrefillRequest, int], request: PrefillRequest, room: int) -> int:
        """Move a request's end of chunk by at most `room` tokens; returns by how many."""
        start = request.num_scheduled_tokens
        before = ends.get(request, start)
        goal = min(request.runnable_until(start), start + self._config.max_chunk_tokens)
        end = min(goal, before + room)
        if end < request.runnable_until(start):
            # Cut on a block boundary, so that chunks hand over whole blocks. Only a step's first chunk may be smaller than that.
            aligned = end - end % self._config.block_size
            if aligned > before:
                end = aligned
            elif ends and before + room < goal:
                end = before
        if end > before:
            ends[request] = end
        return end - before

    # --- booking ----------------------------------------------------------------------------------------------------

    def _is_still_here(self, chunk: PrefillChunk) -> bool:
        """Count a step's end for one request; who left meanwhile gives its blocks back now."""
        request = chunk.request
        request.num_steps_in_flight -= 1
        if request.state is PrefillState.LEAVING and not request.num_steps_in_flight:
            self._leaving.remove(request)
            self._free(request)
        return request.state is PrefillState.RUNNING

    def _book(self, chunk: PrefillChunk, token: Token | None) -> PrefillProgress:
        request = chunk.request
        if chunk.start != request.num_computed_tokens:
            raise InternalError(f"request {request.request_id}: steps were committed out of order")
        first_full = request.num_computed_tokens // self._config.block_size
        request.num_computed_tokens = chunk.end
        for place in range(first_full, chunk.end // self._config.block_size):
            self._pool.cache(request.block_table[place], request.hashes[place])
            self._stop_computing(request, request.hashes[place])
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
        for block_hash in request.hashes[request.num_computed_tokens // self._config.block_size :]:
            self._stop_computing(request, block_hash)

    def _free(self, request: PrefillRequest) -> None:
        self._pool.free(request.block_table)
        request.block_table = []
        request.state = PrefillState.GONE

    def _stop_computing(self, request: PrefillRequest, block_hash: int) -> None:
        if self._computing.get(block_hash) is request:
            del self._computing[block_hash]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _check(self, request: PrefillRequest) -> None:
        if not 0 < request.num_prompt_tokens <= request.num_tokens:
            raise BadRequest(f"request {request.request_id}: {request.num_prompt_tokens} prompt tokens of {request.num_tokens}")
        if request.num_tokens >= self._config.max_model_len:
            raise PromptTooLong(
                f"{request.num_tokens} tokens leave no room for output; the model's context is {self._config.max_model_len}"
            )
        wrong = check_items(request.items, request.num_tokens)
        if wrong:
            raise BadRequest(f"request {request.request_id}: {wrong}")

    def _require_finished(self, request: PrefillRequest) -> None:
        if request.state is not PrefillState.FINISHED:
            raise InternalError(f"request {request.request_id} is {request.state.name.lower()}, not finished")

    def _unfinished(self) -> Iterable[PrefillRequest]:
        yield from self._waiting.values()
        yield from self._running.values()

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)
