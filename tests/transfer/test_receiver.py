"""Pulling blocks over each rung, and refusing what does not prove itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from epd.cache.block_pool import BlockPool
from epd.clock import monotonic
from epd.errors import CorruptTransfer, EpdError, PeerLost, StaleHandle
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from epd.transfer.receiver import Receiver
from epd.transfer.sender import Sender
from gpu.cpu import CpuBackend
from gpu.errors import CannotMap
from gpu.host_pool import HostPool
from gpu.pool import PoolSpec
from protocol.messages import KVRef, RequestId
from tests.support.clock import FakeClock
from tests.support.systems import running

NUM_BLOCKS, BLOCK_BYTES = 8, 4096 + 40


class _Owner(Actor):
    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self.sender = sender

    async def receive(self, mail: Mail) -> None:
        assert self.sender.handle(mail, self)


@dataclass
class _Pair:
    systems: list[System]
    source: HostPool
    blocks: BlockPool
    target: HostPool
    receiver: Receiver
    clock: FakeClock

    def ref(self, num: int, **changes: object) -> KVRef:
        ids = self.blocks.allocate(num)
        assert ids is not None
        made = KVRef(
            worker=self.systems[0].worker,
            generation=self.source.generation,
            layout=self.source.layout,
            lease_id=self.blocks.lease(ids, self.clock() + 10),
            request_id=RequestId("r"),
            epoch=1,
            first_block=0,
            block_ids=tuple(ids),
            checksums=tuple(self.source.checksum(ids)),
        )
        return msgspec.structs.replace(made, **changes)

    async def pull(self, ref: KVRef, ids: list[int]) -> None:
        await self.receiver.pull(ref, self.systems[0].endpoint, self.target, ids)


@asynccontextmanager
async def _pair(allowed: str) -> AsyncIterator[_Pair]:
    backend = CpuBackend()
    clock = FakeClock()
    try:
        async with running("owner", "puller") as systems:
            source = backend.allocate_pool(PoolSpec(NUM_BLOCKS, BLOCK_BYTES, "kv", 5))
            target = backend.allocate_pool(PoolSpec(NUM_BLOCKS, BLOCK_BYTES, "kv", 5))
            source.blocks[:] = np.random.default_rng(0).integers(0, 256, source.blocks.shape, dtype=np.uint8)
            blocks = BlockPool(NUM_BLOCKS)
            stream = backend.open_stream("in")
            await systems[0].register("prefill", _Owner(Sender(systems[0].worker, "kv", source, blocks, stream)))
            receiver = Receiver(systems[1], backend, stream, allowed=allowed, local_pools=[target], clock=monotonic)
            yield _Pair(systems, source, blocks, target, receiver, clock)
            receiver.close()
    finally:
        backend.close()


RUNGS = pytest.mark.parametrize("allowed", ["mapped", "socket"])


@RUNGS
async def test_blocks_arrive_where_they_belong(allowed: str) -> None:
    async with _pair(allowed) as pair:
        ref = pair.ref(3)
        await pair.pull(ref, [6, 0, 3])
        assert (pair.target.blocks[[6, 0, 3]] == pair.source.blocks[list(ref.block_ids)]).all()
        assert not pair.target.blocks[[1, 2, 4, 5, 7]].any()
        (link,) = pair.receiver.links()
        assert (link.rung, link.num_transfers, link.num_bytes) == (allowed, 1, 3 * BLOCK_BYTES)


@RUNGS
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"generation": 1}, StaleHandle),
        ({"layout": 6}, StaleHandle),
        ({"block_ids": (0, NUM_BLOCKS)}, StaleHandle),
        ({"checksums": (1, 2)}, CorruptTransfer),
    ],
)
async def test_what_does_not_prove_itself_is_refused(allowed: str, changes: dict[str, object], error: type[EpdError]) -> None:
    async with _pair(allowed) as pair:
        with pytest.raises(error):
            await pair.pull(pair.ref(2, **changes), [0, 1])


async def test_over_a_socket_only_leased_blocks_are_given() -> None:
    async with _pair("socket") as pair:
        ref = pair.ref(2)
        pair.clock.advance(11)
        assert pair.blocks.expire(pair.clock()) == [ref.lease_id]
        with pytest.raises(StaleHandle, match="lease"):
            await pair.pull(ref, [0, 1])


async def test_a_pool_that_cannot_be_mapped_is_read_over_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _pair("auto") as pair:

        def map_pool(export: object) -> None:
            raise CannotMap("another user's")

        monkeypatch.setattr(pair.receiver._backend, "map_pool", map_pool)
        ref = pair.ref(2)
        await pair.pull(ref, [0, 1])
        assert (pair.target.blocks[[0, 1]] == pair.source.blocks[list(ref.block_ids)]).all()
        assert pair.receiver.links()[0].rung == "socket"


@RUNGS
async def test_an_owner_that_has_gone_is_reported(allowed: str) -> None:
    async with _pair(allowed) as pair:
        ref = pair.ref(2)
        await pair.pull(ref, [0, 1])
        endpoint = pair.systems[0].endpoint
        await pair.systems[0].stop()
        pair.source.close()
        with pytest.raises((PeerLost, StaleHandle)):
            await pair.receiver.pull(ref, endpoint, pair.target, [0, 1])


async def test_a_new_generation_is_mapped_anew() -> None:
    async with _pair("mapped") as pair:
        await pair.pull(pair.ref(1), [0])
        await pair.systems[0].unregister("prefill")
        backend = CpuBackend()
        stream = backend.open_stream("reads")
        fresh = backend.allocate_pool(PoolSpec(NUM_BLOCKS, BLOCK_BYTES, "kv", 5))
        fresh.blocks[:] = 77
        blocks = BlockPool(NUM_BLOCKS)
        await pair.systems[0].register("prefill", _Owner(Sender(pair.systems[0].worker, "kv", fresh, blocks, stream)))
        stale = pair.ref(1)
        pair.source, pair.blocks = fresh, blocks
        await pair.pull(pair.ref(1), [5])
        assert (pair.target.blocks[5] == 77).all()
        with pytest.raises(StaleHandle):
            await pair.pull(stale, [1])
        backend.close()
