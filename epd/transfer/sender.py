"""The owner's end of a transfer: answers for one pool, and only for blocks that the asker holds a lease on.

Knows: the pool's memory and its block numbers. Does not know: what the blocks hold or who may want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from epd.errors import EpdError, InternalError, StaleHandle
from epd.microkernel.actor import Actor, Mail, Reply
from epd.stream import on_stream
from gpu.errors import GpuError
from gpu.pool import Pool
from gpu.stream import Stream
from protocol.messages import (
    BlocksFetched,
    DescribePool,
    FetchBlocks,
    PoolDescribed,
    PoolRef,
    ReleaseLease,
    WorkerId,
)


class LeaseHolder(Protocol):
    """A block pool or an encoder cache."""

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool: ...

    def release(self, lease_id: int, *, is_corrupt: bool = False) -> bool: ...


class Sender:
    """Serves one pool of one stage actor."""

    def __init__(self, worker: WorkerId, kind: str, memory: Pool, blocks: LeaseHolder, stream: Stream) -> None:
        """`stream` reads the blocks of a pool that is not in host memory."""
        export = memory.export()
        self.pool = PoolRef(
            worker=worker,
            kind=kind,
            generation=memory.generation,
            layout=memory.layout,
            num_blocks=memory.num_blocks,
            block_bytes=memory.block_bytes,
            memory=export.memory,
            handle=export.handle,
        )
        self._memory = memory
        self._blocks = blocks
        self._stream = stream

    def handle(self, mail: Mail, actor: Actor) -> bool:
        """Answer a message that is about the pool, as `actor`. False: it is not, somebody else must."""
        match mail.message:
            case DescribePool():
                mail.reply.send(PoolDescribed(self.pool))
            case FetchBlocks() as fetch:
                self._check(fetch)
                if self._memory.is_host:
                    mail.reply.send(BlocksFetched(len(fetch.block_ids)), self._memory.read(fetch.block_ids))
                else:
                    actor.spawn(self._stage(fetch, mail.reply), name="read blocks")
            case ReleaseLease(lease_id=lease_id, is_corrupt=is_corrupt):
                self._blocks.release(lease_id, is_corrupt=is_corrupt)
            case _:
                return False
        return True

    async def _stage(self, fetch: FetchBlocks, reply: Reply) -> None:
        """Blocks by way of host memory. What was read is sent only if the lease has held meanwhile."""
        try:
            buffers = await on_stream(self._stream, self._memory.read, fetch.block_ids)
            self._check(fetch)
        except EpdError as error:
            reply.fail(error)
        except GpuError as error:
            reply.fail(InternalError(f"blocks could not be read from the device: {error}"))
        else:
            reply.send(BlocksFetched(len(fetch.block_ids)), buffers)

    def _check(self, fetch: FetchBlocks) -> None:
        if fetch.kind != self.pool.kind or fetch.generation != self.pool.generation:
            raise StaleHandle(f"the {fetch.kind} pool of generation {fetch.generation:#x} is gone")
        if not self._blocks.owns(fetch.lease_id, fetch.block_ids):
            raise StaleHandle(f"lease {fetch.lease_id} does not hold these blocks, or has ended")
