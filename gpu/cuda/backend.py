"""The backend for one CUDA device: its memory, its streams, and what other processes on this host have on it."""

from __future__ import annotations

from contextlib import suppress

import torch

from gpu.cuda.driver import Driver
from gpu.cuda.kernels import Kernels
from gpu.cuda.mapping import MappedCudaPool, Mappings
from gpu.cuda.mover import Mover
from gpu.cuda.pool import CudaPool, CudaScratch
from gpu.cuda.processes import HostProcesses, Processes
from gpu.cuda.stream import CudaStream
from gpu.errors import DeviceFailed
from gpu.pool import PoolExport, PoolSpec


def open_cuda(index: int) -> CudaBackend:
    """The device that CUDA numbers `index` here, with the kernels that are best on it. Raises UnknownDevice, saying why.

    In float32 where the device is from before bfloat16.
    """
    from gpu.cuda.cupy_driver import CupyDriver

    driver = CupyDriver(index)
    from gpu.cuda.choose import choose_kernels  # compilers, of no use without a device

    dtype = torch.bfloat16 if driver.info.capability >= (8, 0) else torch.float32
    return CudaBackend(driver, choose_kernels("auto"), dtype=dtype)


class CudaBackend:
    """Owns the streams, pools and mappings it made until they are closed, one by one or all with it.

    `kernels` are the ones to be used with its tensors.
    """

    name = "cuda"

    def __init__(
        self, driver: Driver, kernels: Kernels, *, dtype: torch.dtype = torch.bfloat16, processes: Processes | None = None
    ) -> None:
        driver.use()
        self.driver = driver
        self.kernels = kernels
        self.torch_device = str(driver.torch_device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.block_format = f"{self.dtype} sum64"
        self._torch_dtype = dtype
        self._processes = processes or HostProcesses()
        self._mover = Mover(driver, kernels)
        self._mappings = Mappings(driver, self._mover, self._processes)
        self._streams: list[CudaStream] = []
        self._pools: list[CudaPool] = []

    def open_stream(self, name: str, *, priority: int = 0) -> CudaStream:
        self.driver.use()
        stream = CudaStream(self.driver, name, priority=priority)
        self._streams.append(stream)
        return stream

    def allocate_pool(self, spec: PoolSpec) -> CudaPool:
        """Raises OutOfMemory."""
        self.driver.use()
        pool = CudaPool(self.driver, self._mover, self._processes, spec)
        self._pools.append(pool)
        return pool

    def allocate_scratch(self, num_blocks: int, block_bytes: int) -> CudaScratch:
        """For use on the streams that are open now. Raises OutOfMemory."""
        self.driver.use()
        memory = self.driver.borrow(num_blocks * block_bytes, tuple(stream.handle for stream in self._streams))
        return CudaScratch(self._mover, memory.view(num_blocks, block_bytes), self._torch_dtype)

    def map_pool(self, export: PoolExport) -> MappedCudaPool:
        """Raises CannotMap. May take milliseconds."""
        return self._mappings.map(export)

    def memory_budget(self) -> int:
        self.driver.use()
        return self.driver.free_bytes()

    def close(self) -> None:
        """Streams first: what they were given may be reading what comes after."""
        with suppress(DeviceFailed):  # of a lost context nothing can be closed, but the threads end
            self.driver.use()
        for stream in self._streams:
            stream.close()
        self._mappings.close()
        for pool in self._pools:
            pool.close()
        self._mover.pinned.close()
        self._streams.clear()
        self._pools.clear()
