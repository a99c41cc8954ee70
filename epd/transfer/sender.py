"""The owner's end of a transfer: answers for one pool, and only for blocks that the asker holds a lease on.

Knows: the pool's memory and its block numbers. Does not know: what the blocks hold or who may want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from epd.clock import Clock
from epd.errors import StaleHandle
from epd.microkernel.actor import Mail
from gpu.pool import Pool
from protocol.messages import (
    BlocksFetched,
    DescribePool,
    FetchBlocks,
    PoolDescribed,
    PoolRef,
    ReleaseLease,
    RenewLease,
    WorkerId,
)


class LeaseHolder(Protocol):
    """A block pool or an encoder cache."""

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool: ...

    def renew(self, lease_id: int, expires_at: float) -> bool: ...

    def release(self, lease_id: int) -> bool: ...


class Sender:
    """Serves one pool of one stage actor."""

    def __init__(self, worker: WorkerId, kind: str, memory: Pool, blocks: LeaseHolder, clock: Clock) -> None:
        export = memory.export()
        self.pool = PoolRef(
            worker=worker,
            kind=kind,
            generation=memory.generation,
            layout=memory.layout,
            num_blocks=memory.num_blocks,
            block_bytes=memory.block_bytes,
            pid=export.pid,
            fd=export.fd,
            inode=export.inode,
        )
        self._memory = memory
        self._blocks = blocks
        self._clock = clock

    def handle(self, mail: Mail) -> bool:
        """Answer a message that is about the pool. False: it is not, somebody else must."""
        match mail.message:
            case DescribePool():
                mail.reply.send(PoolDescribed(self.pool))
            case FetchBlocks() as fetch:
                mail.reply.send(BlocksFetched(len(fetch.block_ids)), self._leased(fetch))
            case RenewLease(lease_id=lease_id, lease_s=lease_s):
                self._blocks.renew(lease_id, self._clock() + lease_s)
            case ReleaseLease(lease_id=lease_id):
                self._blocks.release(lease_id)
            case _:
                return False
        return True

    def _leased(self, fetch: FetchBlocks) -> Sequence[memoryview]:
        if fetch.kind != self.pool.kind or fetch.generation != self.pool.generation:
            raise StaleHandle(f"the {fetch.kind} pool of generation {fetch.generation:#x} is gone")
        if not self._blocks.owns(fetch.lease_id, fetch.block_ids):
            raise StaleHandle(f"lease {fetch.lease_id} does not hold these blocks, or has ended")
        return [self._memory.block(block_id) for block_id in fetch.block_ids]
