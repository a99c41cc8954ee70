"""The decode stage: KV in, one token per step and request out.

The I/O shell round `DecodeScheduler`: it pulls KV into reserved blocks while prefill still works, keeps its stream supplied with
planned steps, and tells gateways the tokens of each step as it comes back.

Owns: the decode of each request here (`entry.Entry`) and the KV pool's memory. Does not know: text, images, who placed what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from epd.cache.block_pool import BlockPool
from epd.clock import Clock
from epd.decode.entry import Entry
from epd.decode.intake import Adopting, Copying, pull
from epd.decode.outbox import Outbox
from epd.decode.request import DecodeOutput, DecodePlan, DecodeRequest
from epd.decode.scheduler import DecodeScheduler
from epd.errors import Cancelled, DeadlineExceeded, EpdError
from epd.flights import Flights
from epd.microkernel.actor import Mail, Reply
from epd.model.positions import mrope_next
from epd.stage import StageActor, unexpected, whose_fault
from epd.step import StepPlan, TextRunner, read_token_ids
from epd.transfer.receiver import Receiver
from gpu.errors import DeviceFailed
from gpu.pool import Pool
from gpu.stream import Stream
from protocol.messages import Abort, Decode, Finished, Handoff, LinkLoad, Preempted, RequestId, StageLoad, Token

_PATIENCE_S = 1.0  # of prefill on the same pool, until reservations for prompts computed elsewhere have to give way


class DecodeActor(StageActor):
    """One per decode worker. `shares_pool`: prefill runs in this process on the same pool; from there tables move, not bytes.

    `num_blocks_short(now, patience_s)`: how many blocks that prefill lacks, if it has lacked them for longer than that.
    """

    role = "decode"

    def __init__(
        self,
        *,
        scheduler: DecodeScheduler,
        blocks: BlockPool,
        memory: Pool,
        receiver: Receiver,
        runner: TextRunner,
        stream: Stream,
        block_size: int,
        merge_size: int,
        shares_pool: bool,
        num_blocks_short: Callable[[float, float], int] = lambda now, patience_s: 0,
        clock: Clock,
    ) -> None:
        super().__init__(clock=clock)
        self._num_blocks_short = num_blocks_short
        self._scheduler = scheduler
        self._blocks = blocks
        self._memory = memory
        self._receiver = receiver
        self._runner = runner
        self._flights: Flights[DecodePlan] = Flights(stream, runner, wake=self.wake, clock=clock)
        self._block_size = block_size
        self._merge_size = merge_size
        self._shares_pool = shares_pool
        self._entries: dict[RequestId, Entry] = {}
        self._adopting: list[Adopting] = []  # of requests that are here, or have just left
        self._outbox = Outbox(self)

    # --- messages ---------------------------------------------------------------------------------------------------

    async def receive(self, mail: Mail) -> None:
        match mail.message:
            case Decode() as message:
                await self._add(message, mail.reply)
            case Abort(request_id=request_id, epoch=epoch):
                self._abort(request_id, epoch, Cancelled("aborted"))
            case _:
                raise unexpected(self, mail)

    async def _add(self, message: Decode, reply: Reply) -> None:
        self.refuse_if_draining()
        await self._replace(message)
        now = self.clock()
        request = DecodeRequest(
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
        entry = Entry(request, message, reply, position_shift=mrope_next(0, message.items, self._merge_size))
        if self._shares_pool and message.prefill.worker == self.address.worker:
            entry.reserved_at = now
            entry.pull = self.spawn(self._adopt(entry), name=f"adopt {request.request_id}")
        else:
            self._scheduler.add(request)
        self._entries[message.request_id] = entry
        reply.on_cancel(lambda: self._abort(message.request_id, message.epoch, Cancelled("the asker left")))
        self.wake()

    async def _replace(self, message: Decode) -> None:
        """An older attempt of the same request ends before its blocks can be given to this one."""
        known = self._entries.get(message.request_id)
        if known is not None and known.request.epoch < message.epoch:
            self._abort(message.request_id, known.request.epoch, Cancelled("a newer attempt has begun"))
            if known.pull is not None:
                await asyncio.wait([known.pull])

    # --- the way in -------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        if self._num_blocks_short(self.clock(), _PATIENCE_S):
            return  # what gets free is for prefill, which has waited long enough
        for reservation in self._scheduler.reserve():
            entry = self._entries[reservation.request.request_id]
            entry.reserved_at = self.clock()
            entry.copying = Copying(reservation, self._receiver, self._memory)
            entry.pull = self.spawn(self._copy(entry, entry.copying), name=f"pull {entry.request.request_id}")

    def _make_way(self, num_blocks: int) -> None:
        """Reservations whose prefill has not begun elsewhere give way, the latest first, where that lets prefill here go on.

        It may be for each other that they wait: two workers with both stages, each prefilling for the other's decode, whose
        reservations leave neither a prompt's room. Whoever loses patience first ends that. While anybody decodes here, blocks
        come back without it.
        """
        if len(self._flights):
            return
        unbegun = [entry for entry in self._entries.values() if entry.waits_for_prefill]
        victims: list[Entry] = []
        for entry in sorted(unbegun, key=lambda entry: entry.request.order, reverse=True):
            if num_blocks <= 0:
                break
            victims.append(entry)
            num_blocks -= len(entry.request.block_table)  # those of its cached prefix, too: nobody else may hold them
        if num_blocks <= 0:
            for entry in victims:
                self._scheduler.num_preemptions += 1
                self._leave(entry, entry.preempted())

    async def _copy(self, entry: Entry, copying: Copying) -> None:
        """Pull a request's KV into its reserved blocks, which are not given back before that has ended, one way or another."""
        request = entry.request
        try:
            handoff = await self._pull(entry, copying)
            self._begin(entry, self._scheduler.handoff(request.request_id, handoff.num_tokens, handoff.token), handoff.token)
        except EpdError as error:
            entry.pull = None
            self._leave(entry, error)  # the gateway decides what becomes of the request
        finally:
            self.freed()

    async def _adopt(self, entry: Entry) -> None:
        """Take over the blocks that prefill wrote in the pool that both use."""
        request = entry.request
        adopting = Adopting(self._blocks, self._receiver)
        self._adopting.append(adopting)
        try:
            handoff = await self._pull(entry, adopting)
            is_running = self._scheduler.adopt(request, adopting.table, handoff.token)
            adopting.table = []  # the scheduler's from here on
            self._begin(entry, is_running, handoff.token)
        except EpdError as error:
            entry.pull = None
            self._leave(entry, error)  # the gateway decides what becomes of the request
        finally:
            adopting.give_back()
            self._adopting.remove(adopting)
            self.freed()

    async def _pull(self, entry: Entry, taker: Copying | Adopting) -> Handoff:
        request = entry.request
        return await pull(
            self.system,
            request,
            entry.message.prefill,
            taker,
            layout=self._memory.layout,
            num_blocks=-(-len(request.token_ids) // self._block_size),
            timeout_s=max(0.001, request.deadline - self.clock()),
        )

    def _begin(self, entry: Entry, is_running: bool, token: Token) -> None:
        """The request runs from now on, unless prefill's token was its last. The gateway has that token from prefill."""
        entry.pull = None
        entry.running_since = self.clock()
        if not is_running:
            self._finish(entry)

    # --- steps ------------------------------------------------------------------------------------------------------

    async def step(self) -> bool:
        """Book what has come back and keep the stream supplied. It waits for nothing: a step that comes back wakes the loop."""
        for landing in self._flights.landed():
            if isinstance(landing.output, Exception):
                self._fail_step(landing.plan, landing.output)
                continue
            self.stepped(landing.began_s, landing.num_tokens)
            for booked in self._scheduler.commit(landing.plan, landing.output.tokens):
                self._tell(booked)
        self._reserve()
        self._launch()
        self._outbox.flush()
        return False

    def _launch(self) -> None:
        while self._scheduler.can_plan:
            plan = self._scheduler.plan()
            for victim in plan.preempted:
                entry = self._entries[victim.request_id]
                self._leave(entry, entry.preempted())
            if not plan.steps:
                return
            self._flights.launch(plan, self._describe)

    def _describe(self, plan: DecodePlan) -> StepPlan:
        return StepPlan(tuple(self._entries[step.request.request_id].sequence(step) for step in plan.steps))

    def _tell(self, output: DecodeOutput) -> None:
        request = output.request
        entry = self._entries[request.request_id]
        self._outbox.add(entry.gateway, (request.request_id, request.epoch, output.index, output.token))
        if output.token.finish_reason:
            self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        request = entry.request
        spans = self.counted(entry.spans(self.clock()))
        self._leave(entry, Finished(request.request_id, request.epoch, request.num_output_tokens, spans=spans))

    def _fail_step(self, plan: DecodePlan, error: Exception) -> None:
        """A runner that raises has done so because of what it was given: who is to blame ends, the others and the stage go on."""
        if isinstance(error, DeviceFailed):
            raise error  # no step will ever work again here: the stage ends, and its requests begin anew elsewhere
        self._log.error("a decode step failed", error=error, num_requests=len(plan.steps))
        for request in self._scheduler.retract(plan):
            self._leave(self._entries[request.request_id], whose_fault(self, error))

    # --- endings ----------------------------------------------------------------------------------------------------

    def _abort(self, request_id: RequestId, epoch: int, error: EpdError) -> None:
        entry = self._entries.get(request_id)
        if entry is not None and entry.request.epoch <= epoch:
            self._leave(entry, error)

    async def evacuate(self) -> None:
        """Send every request that is here back to its gateway, to go on elsewhere with the same tokens."""
        for entry in list(self._entries.values()):
            self._leave(entry, entry.preempted())

    def _leave(self, entry: Entry, answer: Finished | Preempted | EpdError) -> None:
        """The one way out: whoever asked is answered, and the blocks are free once nothing writes to them any more."""
        request = entry.request
        if self._entries.get(request.request_id) is not entry:
            return  # it has left before
        del self._entries[request.request_id]
        if isinstance(answer, EpdError):
            entry.reply.fail(answer)
        else:
            entry.reply.send(answer)

        def free(_: object = None) -> None:
            self._scheduler.abort(request.request_id, request.epoch)  # no news to it where it was the one to say so
            self.freed()

        if entry.pull is None:
            free()
        else:
            entry.pull.add_done_callback(free)  # not by the task itself: one that is cancelled before its start does nothing
            entry.pull.cancel()

    def sweep(self, now: float) -> None:
        overdue = [entry.request for entry in self._entries.values() if entry.request.deadline <= now]
        for request in overdue:
            self._abort(request.request_id, request.epoch, DeadlineExceeded("the request ran out of time in decode"))
        self._make_way(self._num_blocks_short(now, _PATIENCE_S))

    async def stopped(self) -> None:
        await self._flights.settle()
        self._runner.close()
        self._receiver.close()

    # --- what others see --------------------------------------------------------------------------------------------

    def load(self) -> StageLoad:
        return StageLoad(
            role=self.role,
            num_waiting=self._scheduler.num_waiting + self._scheduler.num_receiving,
            num_running=self._scheduler.num_running,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_leases=self._blocks.num_leases,
            num_cached_blocks=self._blocks.num_cached,
            cache_hits=self._blocks.cache_hits,
            cache_queries=self._blocks.cache_queries,
            num_preemptions=self._scheduler.num_preemptions,
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
        return self._scheduler.is_idle() and not self._entries and not self._adopting

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self._memory.check_integrity()
        if self.has_pool_to_itself:
            self._blocks.check_integrity([*self._scheduler.tables(), *(adopting.table for adopting in self._adopting)])
