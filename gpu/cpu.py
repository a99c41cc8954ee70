"""The backend that needs nothing but a processor: host memory, threads as streams, compiled kernels."""

from __future__ import annotations

from gpu.errors import CannotMap
from gpu.memory import available_bytes
from gpu.pool import MappedPool, Pool, PoolExport, PoolSpec
from gpu.stream import HostStream


class CpuBackend:
    """Owns the streams and pools it made until they are closed, one by one or all with it."""

    name = "cpu"
    torch_device = "cpu"

    def __init__(self) -> None:
        self._streams: list[HostStream] = []
        self._pools: list[Pool] = []

    def open_stream(self, name: str, *, priority: int = 0) -> HostStream:
        stream = HostStream(name, priority=priority)
        self._streams.append(stream)
        return stream

    def allocate_pool(self, spec: PoolSpec) -> Pool:
        """Raises OutOfMemory."""
        pool = Pool(spec)
        self._pools.append(pool)
        return pool

    def map_pool(self, export: PoolExport) -> MappedPool:
        """Raises CannotMap."""
        return MappedPool(export)

    def can_map(self, export: PoolExport) -> bool:
        """Whether map_pool would succeed now: the other end shares this host's memory and lets us read it."""
        try:
            MappedPool(export).close()
        except CannotMap:
            return False
        return True

    def memory_budget(self) -> int:
        return available_bytes()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for pool in self._pools:
            pool.close()
        self._streams.clear()
        self._pools.clear()
