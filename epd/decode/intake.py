"""The taking end of a KV handoff: pulls a request's blocks while prefill computes them, until the handoff.

Two ways to take: into blocks that were reserved for the request (`Copying`), or, where prefill and decode share a pool, by taking
over the blocks themselves (`Adopting`): then the table moves and no byte does.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Protocol

import msgspec

from epd.cache.block_pool import BlockPool
from epd.decode.request import DecodeRequest, Reservation
from epd.errors import CorruptTransfer, EpdError, InternalError, StaleHandle
from epd.microkernel.system import System
from epd.transfer.receiver import Receiver
from gpu.pool import Pool
from protocol.messages import Address, Endpoint, Handoff, KVChunk, KVRef, PullKV, ReleaseLease


class Taker(Protocol):
    """Where runs of blocks go."""

    async def take(self, ref: KVRef, source: Endpoint) -> None:
        """Bring the blocks of one run under this request. The lease may be released afterwards."""

    @property
    def num_taken(self) -> int:
        """Blocks of the request's table that are there, counted from its first."""


class Copying:
    """Copies runs into the blocks of a reservation; what the prefix cache had already is passed over."""

    def __init__(self, reservation: Reservation, receiver: Receiver, memory: Pool) -> None:
        self._reservation = reservation
        self._receiver = receiver
        self._memory = memory
        self.num_taken = reservation.first_block

    @property
    def has_begun(self) -> bool:
        """Whether any of the request's KV has come."""
        return self.num_taken > self._reservation.first_block

    async def take(self, ref: KVRef, source: Endpoint) -> None:
        skip = max(0, self._reservation.first_block - ref.first_block)
        if skip >= len(ref.block_ids):
            return
        wanted = msgspec.structs.replace(ref, block_ids=ref.block_ids[skip:], checksums=ref.checksums[skip:])
        start = ref.first_block + skip - self._reservation.first_block
        if ref.first_block + skip != self.num_taken:
            raise StaleHandle(f"prefill sent block {ref.first_block} where {self.num_taken} was due")
        own = self._reservation.block_ids[start : start + len(wanted.block_ids)]
        if len(own) != len(wanted.block_ids):
            raise StaleHandle("prefill sent more blocks than the prompt has")
        await self._receiver.pull(wanted, source, self._memory, own)
        self.num_taken += len(own)


class Adopting:
    """Takes a reference to every block of a run; `table` is the request's block table in the end."""

    def __init__(self, blocks: BlockPool, receiver: Receiver) -> None:
        self.table: list[int] = []
        self._blocks = blocks
        self._receiver = receiver

    @property
    def num_taken(self) -> int:
        return len(self.table)

    async def take(self, ref: KVRef, source: Endpoint) -> None:
        if not self._receiver.is_local(ref) or not self._blocks.owns(ref.lease_id, ref.block_ids):
            raise StaleHandle("the lease on these blocks has ended")
        if ref.first_block != len(self.table):
            raise StaleHandle(f"prefill sent block {ref.first_block} where {len(self.table)} was due")
        self._blocks.take(ref.block_ids)
        self.table += ref.block_ids
        self._receiver.count_table_move(source)

    def give_back(self) -> None:
        """The request will not run after all."""
        self._blocks.free(self.table)
        self.table = []


async def pull(
    system: System, request: DecodeRequest, source: Endpoint, taker: Taker, *, layout: int, num_blocks: int, timeout_s: float
) -> Handoff:
    """Pull all KV of a request; returns the handoff once every one of its `num_blocks` blocks is there.

    Raises:
        StaleHandle, CorruptTransfer, PeerLost, ...: the request goes back to prefill.
    """
    system.introduce(source)
    to = Address(source.worker, "prefill")
    message = PullKV(request_id=request.request_id, epoch=request.epoch, layout=layout, deadline_s=timeout_s)
    async with aclosing(system.stream(to, message, timeout_s=timeout_s)) as answers:
        async for answer in answers:
            match answer.message:
                case KVChunk(ref=ref):
                    if (ref.request_id, ref.epoch) != (request.request_id, request.epoch):
                        raise StaleHandle(f"prefill sent KV of {ref.request_id} epoch {ref.epoch}")
                    try:
                        await taker.take(ref, source)
                    except CorruptTransfer:
                        await _release(system, to, ref, is_corrupt=True)
                        raise
                    await _release(system, to, ref)
                case Handoff() as handoff:
                    if taker.num_taken != num_blocks:
                        raise StaleHandle(f"the handoff came after {taker.num_taken} of {num_blocks} blocks")
                    return handoff
                case other:
                    raise InternalError(f"prefill streamed {type(other).__name__}")
    raise StaleHandle("prefill ended the handoff before its end")


async def _release(system: System, prefill: Address, ref: KVRef, *, is_corrupt: bool = False) -> None:
    try:
        await system.tell(prefill, ReleaseLease(ref.lease_id, is_corrupt), timeout_s=1.0)
    except EpdError:
        pass  # the lease expires by itself
