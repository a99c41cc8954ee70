"""Prefill and decode schedulers with toy memory in place of runners, transfer and gateway.

Every sequence is computed by reading its whole context back through its block table, so a block given away too early, shared
wrongly or not pulled changes the output. Steps take effect when they are committed; those of requests that have left, and those
that follow a failed one, write rubbish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from epd.cache.block_pool import BlockPool
from epd.decode.request import DecodePlan, DecodeRequest, DecodeState, DecodeStep, Reservation
from epd.decode.scheduler import DecodeConfig, DecodeScheduler
from epd.prefill.config import PrefillConfig
from epd.prefill.request import FinishedBlocks, PrefillPlan, PrefillRequest, PrefillState
from epd.prefill.scheduler import PrefillScheduler
from epd.step import PENDING
from protocol.messages import MMItem, RequestId, Sampling, Token
from tests.support.paged import Cell, PagedMemory, cells_of, draw, generate

EOS = 0
RUBBISH: Cell = ("rubbish",)
FOR_EVER = 1e9
FAR = 10**9


@dataclass(frozen=True)
class Sizes:
    block_size: int = 4
    prefill_blocks: int = 16
    decode_blocks: int = 16
    max_model_len: int = 40
    token_budget: int = 12
    budget_beside_decode: int = 12
    max_chunk_tokens: int = 12
    max_running: int = 4
    num_ids: int = 5
    max_prefills_in_flight: int = 2
    max_decodes_in_flight: int = 2
    # A decode step that feeds what a failed one was to draw: fails, as on a runner that looks its tokens up, or feeds rubbish.
    fails_without_token: bool = True
    is_shared: bool = False
    pair_cost: float = 0.0


@dataclass
class Job:
    """One choice as a gateway follows it."""

    request_id: RequestId
    prompt: list[int]
    items: tuple[MMItem, ...]
    sampling: Sampling
    epoch: int = 0
    output: list[int] = field(default_factory=list)
    is_over: bool = False
    is_aborted: bool = False
    is_poison: bool = False  # the steps that it is in fail
    missing: set[int] = field(default_factory=set)  # images whose embedding has not come in this epoch
    reservation: Reservation | None = None
    told: deque[tuple[FinishedBlocks, int]] = field(default_factory=deque)  # finished and not pulled, with their lease
    first_token: Token | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.token_ids, self.items)


class Cluster:
    """One prefill and one decode worker."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        eos = frozenset([EOS])
        self.prefill_pool = BlockPool(sizes.prefill_blocks)
        self.decode_pool = self.prefill_pool if sizes.is_shared else BlockPool(sizes.decode_blocks)
        self.prefill_memory = PagedMemory(sizes.prefill_blocks, sizes.block_size)
        self.decode_memory = self.prefill_memory if sizes.is_shared else PagedMemory(sizes.decode_blocks, sizes.block_size)
        limits = PrefillConfig(
            sizes.block_size,
            sizes.token_budget,
            sizes.budget_beside_decode,
            sizes.max_chunk_tokens,
            sizes.max_running,
            sizes.max_model_len,
            eos,
            sizes.max_prefills_in_flight,
            sizes.pair_cost,
        )
        self.prefill = PrefillScheduler(limits, self.prefill_pool)
        decode_limits = DecodeConfig(sizes.block_size, sizes.max_running, sizes.max_model_len, eos, sizes.max_decodes_in_flight)
        self.decode = DecodeScheduler(decode_limits, self.decode_pool)
        self.jobs: dict[RequestId, Job] = {}
        self.prefill_steps: deque[tuple[PrefillPlan, list[list[int]]]] = deque()  # with the tables as they were planned
        self.decode_steps: deque[tuple[DecodePlan, list[list[int]]]] = deque()
        self.drawn: dict[DecodeRequest, int] = {}  # by the last decode step that was computed
        self.num_retries = 0
        self.num_ahead = 0  # decode sequences planned before their token was known

    # --- the gateway ------------------------------------------------------------------------------------------------

    def submit(self, prompt: list[int], items: tuple[MMItem, ...], sampling: Sampling) -> Job:
        job = Job(RequestId(f"r{len(self.jobs)}"), prompt, items, sampling)
        self.jobs[job.request_id] = job
        self._attempt(job)
        return job

    def retry(self, job: Job) -> None:
        """As after a failure: a newer epoch replaces whatever is left of the old one."""
        self.num_retries += 1
        self._stop_pulling(job)
        if not self.sizes.is_shared:
            self.decode.abort(job.request_id, job.epoch)
        self._attempt(job)

    def abort(self, job: Job) -> None:
        job.is_over = job.is_aborted = True
        self._stop_pulling(job)
        self.prefill.abort(job.request_id)
        self.decode.abort(job.request_id)

    def embedding(self, job: Job, index: int) -> None:
        job.missing.discard(index)
        self.prefill.embedding_ready(job.request_id, index)

    def _blame(self, blamed: Sequence[PrefillRequest | DecodeRequest]) -> None:
        """Only what failed alone has failed for itself: nobody else is held up by a bad neighbour."""
        for request in blamed:
            job = self.jobs[request.request_id]
            assert job.is_poison
            job.is_poison = False
            self.retry(job)

    def _attempt(self, job: Job) -> None:
        job.epoch += 1
        job.missing = set(range(len(job.items)))
        job.first_token = None
        token_ids = np.array(job.token_ids, np.int32)
        args = (job.request_id, job.epoch, token_ids, len(job.prompt), job.items, job.sampling, FOR_EVER)
        if self.sizes.is_shared:
            self.decode.abort(job.request_id)
        elif job.sampling.max_tokens - len(job.output) > 1:
            self.decode.add(DecodeRequest(*args))
        self.prefill.add(PrefillRequest(*args))
        if self.sizes.is_shared:
            self.prefill.decode_ready(job.request_id)

    def _take(self, job: Job, index: int, token: Token) -> None:
        """Exactly once per place, and nothing after the end."""
        assert not job.is_over
        assert index == len(job.output)
        job.output.append(token.token_id)
        job.is_over = bool(token.finish_reason)

    # --- prefill ----------------------------------------------------------------------------------------------------

    def plan_prefill(self) -> bool:
        if not self.prefill.can_plan:
            return False
        num_beside = self.decode.num_running if self.sizes.is_shared else 0
        plan = self.prefill.plan(0.0, num_beside=num_beside)
        assert plan.num_tokens <= min(self.sizes.token_budget, self.sizes.budget_beside_decode if num_beside else FAR)
        assert len(plan.chunks) <= self.sizes.max_running
        assert len({chunk.request.request_id for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            assert 0 < chunk.num_new <= self.sizes.max_chunk_tokens
            missing = self.jobs[chunk.request.request_id].missing
            assert not missing & {rows.item_index for rows in chunk.item_rows()}
        for finished in plan.reused:
            self._tell(finished)
        if plan.chunks:
            self.prefill_steps.append((plan, [list(chunk.request.block_table) for chunk in plan.chunks]))
        return bool(plan.chunks)

    def commit_prefill(self) -> bool:
        if not self.prefill_steps:
            return False
        plan, tables = self.prefill_steps.popleft()
        self.prefill.took(plan, 0.01 * plan.num_tokens)
        if any(self.jobs[chunk.request.request_id].is_poison for chunk in plan.chunks):
            self._blame(self.prefill.retract(plan))
            return True
        tokens = [self._compute_chunk(plan, place, table) for place, table in enumerate(tables)]
        for progress in self.prefill.commit(plan, tokens):
            job = self.jobs[progress.request.request_id]
            if progress.blocks is not None:
                self._tell(progress.blocks)
            if progress.token is not None:
                self._finish_prefill(job, progress.request, progress.token)
        return True

    def _compute_chunk(self, plan: PrefillPlan, place: int, table: list[int]) -> Token | None:
        chunk = plan.chunks[place]
        request = chunk.request
        if request.state is not PrefillState.RUNNING or chunk.start != request.num_computed_tokens:
            self.prefill_memory.write(table, chunk.start, [RUBBISH] * chunk.num_new)
            return Token(1) if chunk.samples else None
        cells = cells_of(request.token_ids, request.items)
        assert self.prefill_memory.read(table, chunk.start) == cells[: chunk.start]
        self.prefill_memory.write(table, chunk.start, cells[chunk.start : chunk.end])
        return Token(draw(cells, self.sizes.num_ids)) if chunk.samples else None

    def _tell(self, finished: FinishedBlocks) -> None:
        if not self.sizes.is_shared:
            lease_id = self.prefill_pool.lease(finished.block_ids, FOR_EVER)
            self.jobs[finished.request.request_id].told.append((finished, lease_id))

    def _finish_prefill(self, job: Job, request: PrefillRequest, token: Token) -> None:
        self._take(job, request.num_output_tokens, token)
        if self.sizes.is_shared:
            table = list(request.block_table)
            self.prefill_pool.take(table)
            self.prefill.release(job.request_id)
            if token.finish_reason:
                self.prefill_pool.free(table)
            else:
                args = (request.request_id, request.epoch, request.token_ids, request.num_prompt_tokens)
                assert self.decode.adopt(DecodeRequest(*args, request.items, request.sampling, FOR_EVER), table, token)
        elif token.finish_reason:
            self._stop_pulling(job)
            self.decode.abort(job.request_id)
            self.prefill.release(job.request_id)
        else:
            job.first_token = token
            if job.reservation is not None:
                self.prefill.release(job.request_id)

    # --- transfer ---------------------------------------------------------------------------------------------------

    def reserve(self) -> bool:
        reserved = self.decode.reserve()
        for reservation in reserved:
            job = self.jobs[reservation.request.request_id]
            job.reservation = reservation
            self.prefill.decode_ready(job.request_id)
            if job.first_token is not None:
                self.prefill.release(job.request_id)
        return bool(reserved)

    def pull(self, job: Job) -> bool:
        """One run of finished blocks, or the handoff after the last one."""
        if job.reservation is None:
            return False
        if job.told:
            finished, lease_id = job.told.popleft()
            assert self.prefill_pool.owns(lease_id, finished.block_ids)
            for place, block_id in enumerate(finished.block_ids, finished.first_block):
                if place >= job.reservation.first_block:
                    to_id = job.reservation.block_ids[place - job.reservation.first_block]
                    self.prefill_memory.copy_block(block_id, self.decode_memory, to_id)
            self.prefill_pool.release(lease_id)
            return True
        if job.first_token is None:
            return False
        request = job.reservation.request
        assert self.decode_memory.read(request.block_table, request.num_tokens) == job.cells[:-1]
        token, job.first_token, job.reservation = job.first_token, None, None
        assert self.decode.handoff(job.request_id, request.num_tokens, token)
        return True

    def _stop_pulling(self, job: Job) -> None:
        for _, lease_id in job.told:
            self.prefill_pool.release(lease_id)
        job.told.clear()
        job.reservation = None

    # --- decode -----------------------------------------------------------------------------------------------------

    def plan_decode(self) -> bool:
        if not self.decode.can_plan:
            return False
        plan = self.decode.plan()
        assert len(plan.steps) <= self.sizes.max_running
        for request in plan.preempted:
            self._attempt(self.jobs[request.request_id])
        for step in plan.steps:
            if step.token_id == PENDING:
                self.num_ahead += 1
                assert not step.request.needs_history
                assert any(step.request is before.request for before in self.decode_steps[-1][0].steps)
            assert step.request.output_until(step.position)[-1] == step.token_id
            num_drawn = step.position + 1 - step.request.num_prompt_tokens
            assert num_drawn < step.request.sampling.max_tokens, "a step for a request that is certain to have ended"
            assert step.position + 1 < self.sizes.max_model_len, "a step for a request that is certain to have ended"
        if plan.steps:
            self.decode_steps.append((plan, [list(step.request.block_table) for step in plan.steps]))
        return bool(plan.steps or plan.preempted)

    def commit_decode(self) -> bool:
        if not self.decode_steps:
            return False
        plan, tables = self.decode_steps.popleft()
        drawn, self.drawn = self.drawn, {}
        lacks_token = any(step.token_id == PENDING and step.request not in drawn for step in plan.steps)
        is_poisoned = any(self.jobs[step.request.request_id].is_poison for step in plan.steps)
        if is_poisoned or (lacks_token and self.sizes.fails_without_token):
            self._blame(self.decode.retract(plan))
            return True
        tokens = [Token(self._compute_step(step, table, drawn)) for step, table in zip(plan.steps, tables, strict=True)]
        self.drawn = {step.request: token.token_id for step, token in zip(plan.steps, tokens, strict=True)}
        for output in self.decode.commit(plan, tokens):
            self._take(self.jobs[output.request.request_id], output.index, output.token)
        return True

    def _compute_step(self, step: DecodeStep, table: list[int], drawn: dict[DecodeRequest, int]) -> int:
        if step.request.state is not DecodeState.RUNNING or step.position != step.request.num_computed_tokens:
            self.decode_memory.write(table, step.position, [RUBBISH])
            return 1
        cells = self.jobs[step.request.request_id].cells
        assert len(cells) == step.position + 1
        assert (drawn[step.request] if step.token_id == PENDING else step.token_id,) == cells[-1]
        self.decode_memory.write(table, step.position, cells[-1:])
        read = self.decode_memory.read(table, step.position + 1)
        assert read == cells
        return draw(read, self.sizes.num_ids)

    # --- the whole --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.prefill.check_integrity()
        self.decode.check_integrity()
        if self.sizes.is_shared:
            self.prefill_pool.check_integrity([*self.prefill.tables(), *self.decode.tables()])
        else:
            self.prefill_pool.check_integrity(self.prefill.tables())
            self.decode_pool.check_integrity(self.decode.tables())
        for plan, _ in self.prefill_steps:
            for chunk in plan.chunks:
                self._check_writer(self.prefill.tables(), chunk.request.block_table, chunk.start, chunk.end)
        for decode_plan, _ in self.decode_steps:
            for step in decode_plan.steps:
                self._check_writer(self.decode.tables(), step.request.block_table, step.position, step.position + 1)

    def _check_writer(self, tables: list[Sequence[int]], own: Sequence[int], start: int, end: int) -> None:
        """What a step in flight writes to is held by its request alone, also when the request has been aborted."""
        if self.sizes.is_shared:
            tables = [*self.prefill.tables(), *self.decode.tables()]
        for block_id in {own[place // self.sizes.block_size] for place in range(start, end)}:
            assert sum(block_id in table for table in tables) == 1

    def finish(self) -> None:
        """Let everything that is left run to its end, and compare. Each round makes one move of every kind."""
        for job in self.jobs.values():
            job.is_poison = False
        max_rounds = 50 + 4 * sum(len(job.prompt) + job.sampling.max_tokens for job in self.jobs.values())
        for _ in range(max_rounds):
            if all(job.is_over for job in self.jobs.values()) and not self.prefill_steps and not self.decode_steps:
                break
            for job in self.jobs.values():
                for index in [] if job.is_over else sorted(job.missing):
                    self.embedding(job, index)
                self.pull(job)
            self.reserve()
            self.plan_prefill()
            self.plan_prefill()
            self.commit_prefill()
            self.plan_decode()
            self.plan_decode()
            self.commit_decode()
            self.check()
        late = [job.request_id for job in self.jobs.values() if not job.is_over]
        assert not late, f"after {max_rounds} rounds {late} still wait"
        assert self.prefill.is_idle()
        assert self.decode.is_idle()
        assert self.prefill_pool.is_idle()
        assert self.decode_pool.is_idle()

    def expected(self, job: Job) -> list[int]:
        return generate(job.prompt, job.items, job.sampling, num_ids=self.sizes.num_ids, max_model_len=self.sizes.max_model_len)
