"""The backend that needs nothing but a processor: host memory, threads as streams, compiled kernels."""

from __future__ import annotations

from gpu import copy
from gpu.host_pool import HostPool, HostScratch, MappedHostPool
from gpu.memory import available_bytes
from gpu.pool import PoolExport, PoolSpec
from gpu.stream import HostStream


class CpuBackend:
    """Owns the streams and pools it made until they are closed, one by one or all with it."""

    name = "cpu"
    torch_device = "cpu"
    dtype = "float32"
    block_format = "float32 xxh3"

    def __init__(self) -> None:
        self._streams: list[HostStream] = []
        self._pools: list[HostPool] = []

    def open_stream(self, name: str, *, priority: int = 0) -> HostStream:
        stream = HostStream(name, priority=priority)
        self._streams.append(stream)
        return stream

    def allocate_pool(self, spec: PoolSpec) -> HostPool:
        """Raises OutOfMemory."""
        pool = HostPool(spec, copy)
        self._pools.append(pool)
        return pool

    def allocate_scratch(self, num_blocks: int, block_bytes: int) -> HostScratch:
        return HostScratch(num_blocks, block_bytes, copy)

    def map_pool(self, export: PoolExport) -> MappedHostPool:
        """Raises CannotMap."""
        return MappedHostPool(export)

    def memory_budget(self) -> int:
        return available_bytes()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for pool in self._pools:
            pool.close()
        self._streams.clear()
        self._pools.clear()
