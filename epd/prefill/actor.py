"""The prefill stage: prompts in, KV blocks and first tokens out.

The I/O shell round `PrefillScheduler`: it fetches embeddings, keeps its stream supplied with planned steps, and hands finished
blocks to the decode worker that pulls them, run by run while later chunks are still being computed.

Owns: the prefill of each request here (`entry.Entry`) and the KV pool's memory. Does not know: who asks, what text is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epd.cache.block_pool import BlockPool
from epd.clock import Clock
from epd.errors import Cancelled, CorruptTransfer, DeadlineExceeded, EpdError, InternalError, StaleHandle
from epd.flights import Flights
from epd.microkernel.actor import Mail, Reply
from epd.model.positions import check_grids, mrope_positions
from epd.prefill.embeddings import EmbeddingFetcher
from epd.prefill.entry import Entry
from epd.prefill.handoff import EarlyPulls, KVHandoff
from epd.prefill.request import PrefillChunk, PrefillPlan, PrefillRequest
from epd.prefill.scheduler import PrefillScheduler
from epd.stage import StageActor, unexpected, whose_fault
from epd.step import EmbeddingSpan, SampleRequest, SequenceStep, StepOutput, StepPlan, TextRunner, read_token_ids
from epd.transfer.receiver import Receiver
from epd.transfer.sender import Sender
from gpu.errors import DeviceFailed
from gpu.pool import Pool
from gpu.stream import Stream
from protocol.messages import (
    Abort,
    EmbeddingReady,
    EmbeddingTaken,
    LinkLoad,
    Prefill,
    Prefilled,
    PullKV,
    RequestId,
    StageLoad,
    Token,
)


class PrefillActor(StageActor):
    """One per prefill worker. `num_beside`: how many requests decode on the same worker now."""

    role = "prefill"

    def __init__(
        self,
        *,
        scheduler: PrefillScheduler,
        blocks: BlockPool,
        memory: Pool,
        sender: Sender,
        receiver: Receiver,
        fetcher: EmbeddingFetcher,
        runner: TextRunner,
        stream: Stream,
        checksum_stream: Stream,
        merge_size: int,
        num_beside: Callable[[], int],
        clock: Clock,
    ) -> None:
        super().__init__(clock=clock)
        self._num_beside = num_beside
        self._scheduler = scheduler
        self._blocks = blocks
        self._memory = memory
        self._sender = sender
        self._receiver = receiver
        self._fetcher = fetcher
        self._runner = runner
        self._flights: Flights[PrefillPlan] = Flights(stream, runner, wake=self.wake, clock=clock)
        self._checksum_stream = checksum_stream
        self._merge_size = merge_size
        self._entries: dict[RequestId, Entry] = {}
        self._handed_off: dict[RequestId, Entry] = {}  # whose leases may still stand
        self._early = EarlyPulls(clock)

    # --- messages ---------------------------------------------------------------------------------------------------

    async def receive(self, mail: Mail) -> None:
        match mail.message:
            case Prefill() as message:
                self._add(message, mail)
            case EmbeddingReady() as message:
                self.spawn(self._take_embedding(message, mail.reply), name=f"embedding {message.request_id}")
            case PullKV() as message:
                self._attach(message, mail)
            case Abort(request_id=request_id, epoch=epoch):
                self._abort(request_id, epoch, Cancelled("aborted"))
            case _:
                if not self._sender.handle(mail, self):
                    raise unexpected(self, mail)
                self.freed()  # a released lease may have made room

    def _add(self, message: Prefill, mail: Mail) -> None:
        self.refuse_if_draining()
        check_grids(message.items, self._merge_size)
        now = self.clock()
        request = PrefillRequest(
            request_id=message.request_id,
            epoch=message.epoch,
            token_ids=read_token_ids(message.token_ids),
            num_prompt_tokens=message.num_prompt_tokens,
            items=message.items,
            sampling=message.sampling,
            deadline=now + message.deadline_s,
            salt=message.salt,
            arrived_at=now,
        )
        self._abort(message.request_id, message.epoch - 1, Cancelled("a newer attempt has begun"))
        self._scheduler.add(request)
        positions = mrope_positions(request.num_tokens, request.items, self._merge_size)
        entry = self._entries[message.request_id] = Entry(request, mail.reply, positions)

        def leave(_: object = None) -> None:
            self._abort(message.request_id, message.epoch, Cancelled("the asker left"))

        # What has been done here waits for its decode worker as long as that takes, but for nobody once the asker has gone.
        entry.unwatch = self.system.watch(mail.sender, leave)
        mail.reply.on_cancel(leave)
        pull = self._early.take(message.request_id, message.epoch)
        if pull is not None:
            self._attach(*pull)
        self.wake()

    async def _take_embedding(self, message: EmbeddingReady, reply: Reply) -> None:
        """Bring one embedding here, unless the prefix cache covers its image."""
        is_corrupt = False
        try:
            entry = self._entry(message.request_id, message.epoch)
            if not 0 <= message.item_index < len(entry.request.items):
                raise InternalError(f"request {message.request_id} has no image {message.item_index}")
            is_needed = message.item_index in self._scheduler.needed_items(message.request_id)
            item = entry.request.items[message.item_index]
            rows = await self._fetcher.fetch(message.ref, message.endpoint, item) if is_needed else None
            if self._entries.get(message.request_id) is not entry:
                raise StaleHandle(f"request {message.request_id} has ended meanwhile")
        except EpdError as error:
            is_corrupt = isinstance(error, CorruptTransfer)
            reply.fail(error)
            return
        finally:
            await self._fetcher.release(message.ref, message.endpoint, is_corrupt=is_corrupt)
        if rows is not None:
            entry.rows[message.item_index] = rows
        entry.note_embedding(self.clock())
        self._scheduler.embedding_ready(message.request_id, message.item_index)
        reply.send(EmbeddingTaken())
        self.wake()

    def _attach(self, message: PullKV, mail: Mail) -> None:
        """A decode worker has reserved its blocks and pulls. It may be heard before the prompt is."""
        if message.layout != self._memory.layout:
            raise StaleHandle("the decode worker's KV layout is another one: both need the same model and block size")
        entry = self._entries.get(message.request_id)
        if entry is None or entry.request.epoch < message.epoch:
            self._early.park(message, mail)
            return
        if entry.request.epoch > message.epoch or entry.handoff is not None:
            raise StaleHandle(f"request {message.request_id} epoch {message.epoch} is not there to be pulled")
        entry.handoff = KVHandoff(
            entry.request,
            mail.reply,
            sender=self._sender,
            blocks=self._blocks,
            memory=self._memory,
            stream=self._checksum_stream,
            is_local=mail.sender == self._sender.pool.worker,
        )
        for finished in entry.finished:
            entry.handoff.add(finished)
        if entry.token is not None:
            entry.handoff.end(entry.token)
        self._scheduler.decode_ready(message.request_id)
        self.spawn(self._hand_off(entry, entry.handoff), name=f"handoff {message.request_id}")
        self.wake()

    async def _hand_off(self, entry: Entry, handoff: KVHandoff) -> None:
        is_sent = await handoff.run()
        if is_sent and self._entries.get(entry.request.request_id) is entry:
            # Every block is under a lease now, which keeps what the decode worker has not copied yet, while its asker is there.
            del self._entries[entry.request.request_id]
            self._scheduler.release(entry.request.request_id)
            self._handed_off[entry.request.request_id] = entry
            self.freed()
        else:  # it failed, or the request was aborted while the last of it was sent
            handoff.release()
            self.freed()

    # --- steps ------------------------------------------------------------------------------------------------------

    async def step(self) -> bool:
        """Book what has come back and keep the stream supplied. It waits for nothing: a step that comes back wakes the loop."""
        for landing in self._flights.landed():
            if isinstance(landing.output, Exception):
                self._fail_step(landing.plan, landing.output)
            else:
                self.stepped(landing.began_s, landing.num_tokens)
                self._scheduler.took(landing.plan, landing.landed_s - landing.began_s)
                self._commit(landing.plan, landing.output, landing.began_s, landing.landed_s)
        self._launch()
        return False

    def _launch(self) -> None:
        while self._scheduler.can_plan:
            plan = self._scheduler.plan(self.clock(), num_beside=self._num_beside())
            for finished in plan.reused:
                self._entries[finished.request.request_id].add_finished(finished)
            if not plan.chunks:
                return
            self._flights.launch(plan, self._describe)

    def _describe(self, plan: PrefillPlan) -> StepPlan:
        return StepPlan(tuple(self._sequence(chunk) for chunk in plan.chunks))

    def _sequence(self, chunk: PrefillChunk) -> SequenceStep:
        request = chunk.request
        entry = self._entries[request.request_id]
        sample = None
        if chunk.samples:
            prompt = request.token_ids[: request.num_prompt_tokens]
            sample = SampleRequest(request.sampling, prompt, request.token_ids[request.num_prompt_tokens :])
        spans = (
            EmbeddingSpan(part.chunk_offset, entry.rows[part.item_index][part.first_row : part.first_row + part.num_rows])
            for part in chunk.item_rows()
        )
        return SequenceStep(
            request_id=request.request_id,
            token_ids=request.token_ids[chunk.start : chunk.end],
            num_computed_tokens=chunk.start,
            positions=entry.positions[:, chunk.start : chunk.end],
            block_table=np.asarray(request.block_table, dtype=np.int32),
            embeddings=tuple(spans),
            sample=sample,
        )

    def _commit(self, plan: PrefillPlan, output: StepOutput, started: float, now: float) -> None:
        for progress in self._scheduler.commit(plan, output.tokens):
            entry = self._entries[progress.request.request_id]
            entry.note_chunk(started, now)
            if progress.blocks is not None:
                entry.add_finished(progress.blocks)
            entry.drop_rows(self._scheduler.needed_items(progress.request.request_id))
            if progress.token is not None:
                self._finish(entry, progress.token, now)

    def _finish(self, entry: Entry, token: Token, now: float) -> None:
        request = entry.request
        entry.token = token
        spans = self.counted(entry.spans(now))
        if request.items:
            self.spread.observe("embedding_wait_seconds", entry.embedding_wait_s)
        entry.reply.send(Prefilled(request.request_id, request.epoch, token, request.num_cached_tokens, spans=spans))
        if entry.handoff is not None:
            entry.handoff.end(token)
        elif token.finish_reason:
            self._forget(entry)
            self._scheduler.release(request.request_id)

    def _fail_step(self, plan: PrefillPlan, error: Exception) -> None:
        """A runner that raises has done so because of what it was given: who is to blame ends, the others and the stage go on."""
        if isinstance(error, DeviceFailed):
            raise error  # no step will ever work again here: the stage ends, and its requests begin anew elsewhere
        self._log.error("a prefill step failed", error=error, num_requests=len(plan.chunks))
        for request in self._scheduler.retract(plan):
            self._end(self._entries[request.request_id], whose_fault(self, error))

    # --- endings ----------------------------------------------------------------------------------------------------

    def _abort(self, request_id: RequestId, epoch: int, error: EpdError) -> None:
        self._early.drop(request_id, epoch)
        given = self._handed_off.get(request_id)
        if given is not None and given.request.epoch <= epoch:
            self._let_go(given)
        entry = self._entries.get(request_id)
        if entry is not None and entry.request.epoch <= epoch:
            self._scheduler.abort(request_id)
            self._end(entry, error)
            self.freed()

    def _end(self, entry: Entry, error: EpdError) -> None:
        """Everybody who waits for the request hears of its end."""
        self._forget(entry)
        if entry.token is None:
            entry.reply.fail(error)
        if entry.handoff is not None:
            entry.handoff.fail(error)

    def _let_go(self, entry: Entry) -> None:
        """What was handed off has been copied, or nobody wants it any more."""
        del self._handed_off[entry.request.request_id]
        entry.unwatch()
        if entry.handoff is not None:
            entry.handoff.release()
            self.freed()

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.request.request_id) is entry:
            del self._entries[entry.request.request_id]
            entry.unwatch()

    def sweep(self, now: float) -> None:
        for request_id in self._scheduler.expired(now):
            self._abort(
                request_id, self._entries[request_id].request.epoch, DeadlineExceeded("the request ran out of time in prefill")
            )
        self._early.expire(now)
        self._blocks.expire(now)
        for entry in list(self._handed_off.values()):
            if entry.handoff is None or entry.handoff.is_over:
                self._let_go(entry)

    def _entry(self, request_id: RequestId, epoch: int) -> Entry:
        entry = self._entries.get(request_id)
        if entry is None or entry.request.epoch != epoch:
            raise StaleHandle(f"request {request_id} epoch {epoch} is not being prefilled here")
        return entry

    async def stopped(self) -> None:
        await self._flights.settle()
        self._runner.close()
        self._receiver.close()

    # --- what others see --------------------------------------------------------------------------------------------

    def load(self) -> StageLoad:
        return StageLoad(
            role=self.role,
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            outstanding_tokens=self._scheduler.outstanding_tokens,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_leases=self._blocks.num_leases,
            num_cached_blocks=self._blocks.num_cached,
            cache_hits=self._blocks.cache_hits,
            cache_queries=self._blocks.cache_queries,
            is_idle_clean=self.is_clean,
            busy_s=self.busy_s,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_evictions=self._blocks.num_evictions,
            transfer_failures=self._receiver.failures(),
            spreads=(*self.spread.parts(), *self._receiver.spreads()),
        )

    def links(self) -> list[LinkLoad]:
        return self._receiver.links()

    def is_idle(self) -> bool:
        return self._scheduler.is_idle() and not self._entries and not self._blocks.num_leases and not len(self._early)

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self._memory.check_integrity()
        if self.has_pool_to_itself:
            self._blocks.check_integrity(self._scheduler.tables())
        unknown = {
            request_id for request_id, entry in self._entries.items() if self._scheduler.get(request_id) is not entry.request
        }
        if unknown:
            raise InternalError(f"prefill holds entries of requests that its scheduler has forgotten: {sorted(unknown)}")
