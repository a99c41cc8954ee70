"""One request here in decode, as the actor sees it: who waits for it, and the arrays that a step reads."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np

from epd.decode.intake import Copying
from epd.decode.request import DecodeRequest, DecodeStep
from epd.microkernel.actor import Reply
from epd.step import Int32Array, SampleRequest, SequenceStep
from protocol.messages import Address, Decode, Preempted, Span


@dataclass(slots=True, eq=False)
class Entry:
    request: DecodeRequest
    message: Decode
    reply: Reply
    position_shift: int  # position of a text token after the last image - its index
    pull: asyncio.Task[None] | None = None  # owns the request's blocks until its handoff
    copying: Copying | None = None  # into blocks reserved for it; None before that, and where they are taken over
    reserved_at: float = 0.0
    running_since: float = 0.0
    table: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))  # block table, grown by whole copies

    @property
    def waits_for_prefill(self) -> bool:
        """Whether it holds reserved blocks and nothing has come into them yet."""
        return self.pull is not None and self.copying is not None and not self.copying.has_begun

    @property
    def gateway(self) -> Address:
        return self.message.gateway

    def preempted(self) -> Preempted:
        """The answer by which the request goes on elsewhere."""
        return Preempted(self.request.request_id, self.request.epoch, self.request.num_output_tokens)

    def sequence(self, step: DecodeStep) -> SequenceStep:
        """This request's share of a step."""
        request = self.request
        if len(self.table) != len(request.block_table):
            self.table = np.asarray(request.block_table, dtype=np.int32)
        position = step.position + self.position_shift
        return SequenceStep(
            request_id=request.request_id,
            token_ids=np.array([step.token_id], dtype=np.int32),
            num_computed_tokens=step.position,
            positions=np.full((3, 1), position, dtype=np.int32),
            block_table=self.table,
            sample=SampleRequest(request.sampling, request.prompt_token_ids, request.output_until(step.position)),
        )

    def spans(self, now: float) -> tuple[Span, ...]:
        arrived = self.request.arrived_at
        return (
            Span("decode reserve", 0.0, self.reserved_at - arrived),
            Span("transfer", self.reserved_at - arrived, self.running_since - arrived),
            Span("decode", self.running_since - arrived, now - arrived),
        )
