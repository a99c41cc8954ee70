"""The pulling end: takes a handle and brings its blocks into local memory, over the best rung, and proves them.

Owns: the mappings of other workers' pools and the figures of each link. Does not know: schedulers, what blocks hold.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epd.clock import Clock
from epd.distribution import Spreads
from epd.errors import CorruptTransfer, EpdError, InternalError, StaleHandle
from epd.log import Log
from epd.microkernel.system import System
from epd.stream import on_stream
from epd.transfer.plan import Ref, Rung, check_handle, kind_of, may_map, pieces
from gpu.backend import Backend
from gpu.errors import CannotMap, LayoutMismatch, PoolClosed
from gpu.pool import Blocks, Destination, Pool, PoolExport
from gpu.stream import Stream
from protocol.messages import (
    Address,
    BlocksFetched,
    DescribePool,
    Endpoint,
    FetchBlocks,
    LinkLoad,
    PoolDescribed,
    PoolRef,
    Spread,
    WorkerId,
)

DESCRIBE_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 30.0
_log = Log("transfer")


@dataclass(slots=True)
class _Source:
    """What is known of one pool of one worker."""

    pool: PoolRef
    mapped: Blocks | None
    num_readers: int = 0
    is_dropped: bool = False


@dataclass(slots=True)
class _LinkFigures:
    rung: Rung
    num_transfers: int = 0
    num_bytes: int = 0
    transfer_s: float = 0.0


class Receiver:
    """Pulls blocks. One per stage actor; copies run on `stream`, never on the event loop."""

    def __init__(
        self, system: System, backend: Backend, stream: Stream, *, allowed: str, local_pools: Sequence[Pool], clock: Clock
    ) -> None:
        self._system = system
        self._backend = backend
        self._stream = stream
        self._allowed = allowed
        self._local = {pool.generation: pool for pool in local_pools}
        self._clock = clock
        self._sources: dict[tuple[WorkerId, str], _Source] = {}
        self._describing: dict[tuple[WorkerId, str], asyncio.Lock] = {}
        self._figures: dict[WorkerId, _LinkFigures] = {}
        self._failures: Counter[str] = Counter()  # by wire code
        self._spread = Spreads()
        self._watched: dict[WorkerId, Callable[[], None]] = {}

    async def pull(self, ref: Ref, source: Endpoint, dst: Destination, dst_ids: Sequence[int]) -> None:
        """Copy the blocks of `ref` to blocks `dst_ids` of `dst`, and check every block's checksum.

        Raises:
            StaleHandle: the handle does not fit the worker's pool, or its lease has ended.
            CorruptTransfer: bytes do not have the checksum that their owner computed.
            PeerLost, DeadlineExceeded: the worker went away meanwhile.
        """
        started = self._clock()
        try:
            rung = await self._pull(ref, source, dst, dst_ids)
        except EpdError as error:
            self._failures[error.code] += 1
            raise
        self._count(source.worker, rung, len(dst_ids) * dst.block_bytes, started)

    async def _pull(self, ref: Ref, source: Endpoint, dst: Destination, dst_ids: Sequence[int]) -> Rung:
        local = self._local.get(ref.generation)
        if local is not None:
            await self._copy(local, ref, dst, dst_ids)
            return Rung.LOCAL
        self._system.introduce(source)
        known = await self._source(ref, source)
        check_handle(ref, known.pool)
        if known.mapped is not None:
            await self._read_mapped(known, known.mapped, ref, dst, dst_ids)
            return Rung.MAPPED
        await self._fetch(ref, known.pool, dst, dst_ids)
        return Rung.SOCKET

    def is_local(self, ref: Ref) -> bool:
        """Whether the handle points into a pool of this process."""
        return ref.generation in self._local

    def count_table_move(self, source: Endpoint) -> None:
        """A handoff in this process moved a table and no byte."""
        self._figures.setdefault(source.worker, _LinkFigures(Rung.LOCAL)).num_transfers += 1

    def links(self) -> list[LinkLoad]:
        return [
            LinkLoad(worker, figures.rung, figures.num_transfers, figures.num_bytes, figures.transfer_s)
            for worker, figures in self._figures.items()
        ]

    def failures(self) -> tuple[tuple[str, int], ...]:
        """How many pulls brought nothing, by wire code."""
        return tuple(self._failures.items())

    def spreads(self) -> tuple[Spread, ...]:
        """How long pulls take, by rung."""
        return self._spread.parts()

    def close(self) -> None:
        for unwatch in self._watched.values():
            unwatch()
        for key in list(self._sources):
            self._drop(key)

    # --- rungs ------------------------------------------------------------------------------------------------------

    async def _copy(self, pool: Blocks, ref: Ref, dst: Destination, dst_ids: Sequence[int]) -> None:
        try:
            wrong = await on_stream(self._stream, dst.copy_from, pool, ref.block_ids, dst_ids, ref.checksums)
        except PoolClosed as error:
            raise StaleHandle(f"the pool of {ref.worker} has been closed") from error
        except LayoutMismatch as error:
            raise StaleHandle(f"blocks of {ref.worker} do not fit here: {error}") from error
        self._refuse_wrong(wrong, ref)

    async def _read_mapped(self, source: _Source, mapped: Blocks, ref: Ref, dst: Destination, dst_ids: Sequence[int]) -> None:
        source.num_readers += 1  # a mapping is not undone under a copy
        try:
            await self._copy(mapped, ref, dst, dst_ids)
        finally:
            source.num_readers -= 1
            if source.is_dropped and source.num_readers == 0:
                mapped.close()

    async def _fetch(self, ref: Ref, pool: PoolRef, dst: Destination, dst_ids: Sequence[int]) -> None:
        """Blocks over the link, received straight into where they belong, or as near to it as the device lets a socket."""
        to = Address(ref.worker, _actor_of(ref))
        for piece in pieces(ref.block_ids, pool.block_bytes):
            message = FetchBlocks(kind_of(ref), ref.generation, ref.lease_id, ref.block_ids[piece])
            landing = dst.landing(dst_ids[piece])
            answer = await self._system.ask(to, message, timeout_s=FETCH_TIMEOUT_S, into=landing.buffers)
            if not isinstance(answer.message, BlocksFetched):
                raise InternalError(f"{ref.worker} answered a fetch with {type(answer.message).__name__}")
            wrong = await on_stream(self._stream, landing.settle, ref.checksums[piece])
            self._refuse_wrong(wrong + piece.start if wrong >= 0 else wrong, ref)

    def _refuse_wrong(self, wrong: int, ref: Ref) -> None:
        if wrong >= 0:
            raise CorruptTransfer(f"block {wrong} of {len(ref.block_ids)} from {ref.worker} does not have its checksum")

    # --- sources ----------------------------------------------------------------------------------------------------

    async def _source(self, ref: Ref, endpoint: Endpoint) -> _Source:
        """The pool that a handle points into; asked for once per generation."""
        key = (ref.worker, kind_of(ref))
        async with self._describing.setdefault(key, asyncio.Lock()):
            known = self._sources.get(key)
            if known is not None and known.pool.generation == ref.generation:
                return known
            if known is not None:
                self._drop(key)
            answer = await self._system.ask(
                Address(ref.worker, _actor_of(ref)), DescribePool(kind_of(ref)), timeout_s=DESCRIBE_TIMEOUT_S
            )
            if not isinstance(answer.message, PoolDescribed):
                raise InternalError(f"{ref.worker} answered DescribePool with {type(answer.message).__name__}")
            pool = answer.message.pool
            if pool.generation != ref.generation:
                raise StaleHandle(f"handle of {ref.worker} is from a {kind_of(ref)} pool that is gone")
            self._sources[key] = _Source(pool, await self._map(pool, endpoint))
            if ref.worker not in self._watched:
                self._watched[ref.worker] = self._system.watch(ref.worker, self._forget)
            return self._sources[key]

    async def _map(self, pool: PoolRef, endpoint: Endpoint) -> Blocks | None:
        if not may_map(self._system.endpoint, endpoint, allowed=self._allowed):
            return None
        export = PoolExport(
            memory=pool.memory,
            handle=pool.handle,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
            generation=pool.generation,
            layout=pool.layout,
        )
        try:
            return await on_stream(self._stream, self._backend.map_pool, export)  # a device takes milliseconds
        except CannotMap as error:
            _log.warning("cannot map, using the socket", worker=pool.worker, kind=pool.kind, reason=str(error))
            return None

    def _forget(self, worker: WorkerId) -> None:
        """Its link is lost. Should it still live, its pools are asked for and mapped again."""
        for key in [key for key in self._sources if key[0] == worker]:
            self._drop(key)

    def _drop(self, key: tuple[WorkerId, str]) -> None:
        source = self._sources.pop(key)
        source.is_dropped = True
        if source.mapped is not None and source.num_readers == 0:
            source.mapped.close()

    def _count(self, worker: WorkerId, rung: Rung, num_bytes: int, started: float) -> None:
        figures = self._figures.setdefault(worker, _LinkFigures(rung))
        figures.rung = rung
        figures.num_transfers += 1
        figures.num_bytes += num_bytes
        elapsed_s = self._clock() - started
        figures.transfer_s += elapsed_s
        self._spread.observe("transfer_seconds", elapsed_s, rung)


def _actor_of(ref: Ref) -> str:
    return "prefill" if kind_of(ref) == "kv" else "encode"
