"""A device that takes its time and computes nothing: pools of small blocks, moved for real, as slowly as large ones.

What a block stands for is larger than what it holds. A copy takes `latency_s` and the time of the bytes that it stands for; the
bytes that it holds are copied, checked and shared between processes as on any host. Imports neither torch nor a compiler, so that
a process is there at once and many fit on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu import plain_copy
from gpu.deferred import Deferred
from gpu.host_pool import HostLanding, HostPool, HostScratch, MappedHostPool
from gpu.pool import Blocks, PoolExport, PoolSpec
from gpu.stream import HostStream


@dataclass(frozen=True, slots=True)
class CopyTimes:
    """How long blocks take to move. `block_bytes`: what a block of each kind stands for."""

    latency_s: float
    bytes_per_s: float
    block_bytes: Mapping[str, int]  # by kind of pool

    def seconds(self, kind: str, num_blocks: int) -> float:
        return self.latency_s + num_blocks * self.block_bytes[kind] / self.bytes_per_s


class EmulatedBackend:
    """Owns the streams and pools it made until it is closed. `memory_bytes` are those of the device that it stands for."""

    name = "emulated"
    torch_device = "none"
    dtype = "none"
    block_format = "emulated xxh3"

    def __init__(self, memory_bytes: int, times: CopyTimes) -> None:
        self._memory_bytes = memory_bytes
        self._times = times
        self._streams: list[EmulatedStream] = []
        self._pools: list[EmulatedPool] = []

    def open_stream(self, name: str, *, priority: int = 0) -> EmulatedStream:
        stream = EmulatedStream(name, priority=priority)
        self._streams.append(stream)
        return stream

    def allocate_pool(self, spec: PoolSpec) -> EmulatedPool:
        pool = EmulatedPool(spec, self._times)
        self._pools.append(pool)
        return pool

    def allocate_scratch(self, num_blocks: int, block_bytes: int) -> EmulatedScratch:
        return EmulatedScratch(num_blocks, block_bytes, self._times)

    def map_pool(self, export: PoolExport) -> MappedHostPool:
        """Raises CannotMap."""
        return MappedHostPool(export)

    def memory_budget(self) -> int:
        return self._memory_bytes

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for pool in self._pools:
            pool.close()
        self._streams.clear()
        self._pools.clear()


class EmulatedStream(HostStream):
    """The next call begins while the device is still at the work of the last, as on a device."""

    def __init__(self, name: str, *, priority: int = 0) -> None:
        self._finishing = HostStream(f"{name} results")
        super().__init__(name, priority=priority)

    def close(self) -> None:
        super().close()
        self._finishing.close()

    def _settle(self, future: Future[Any], value: Any) -> None:
        if not isinstance(value, Deferred):
            future.set_result(value)
            return
        self._finishing.submit(value.value).add_done_callback(lambda finished: _pass_on(finished, future))


def _pass_on(finished: Future[Any], future: Future[Any]) -> None:
    error = finished.exception()
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(finished.result())


class EmulatedPool(HostPool):
    def __init__(self, spec: PoolSpec, times: CopyTimes) -> None:
        super().__init__(spec, plain_copy)
        self._times = times

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> int:
        with _Lasting(self._times.seconds(self.kind, len(src_ids))):
            return super().copy_from(src, src_ids, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> HostLanding:
        return _SlowLanding(self.blocks, block_ids, self._times.seconds(self.kind, len(block_ids)))


class EmulatedScratch(HostScratch):
    """Of embeddings: nothing else is fetched into scratch memory."""

    def __init__(self, num_blocks: int, block_bytes: int, times: CopyTimes) -> None:
        super().__init__(num_blocks, block_bytes, plain_copy)
        self._times = times

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> int:
        with _Lasting(self._times.seconds("embedding", len(src_ids))):
            return super().copy_from(src, src_ids, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> HostLanding:
        return _SlowLanding(self.blocks, block_ids, self._times.seconds("embedding", len(block_ids)))

    def rows(self, width: int) -> npt.NDArray[np.uint64]:
        """Rows hold `width` words, whatever dtype they stand for."""
        return self.blocks.view(np.uint64).reshape(-1, width)


class _SlowLanding(HostLanding):
    """What came over a socket has yet to reach the device."""

    def __init__(self, blocks: npt.NDArray[np.uint8], block_ids: Sequence[int], seconds: float) -> None:
        super().__init__(blocks, block_ids, plain_copy)
        self._seconds = seconds

    def settle(self, checksums: Sequence[int]) -> int:
        with _Lasting(self._seconds):
            return super().settle(checksums)


class _Lasting:
    """A block of code that takes at least so long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._until = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        left = self._until - time.monotonic()
        if left > 0:
            time.sleep(left)
