"""Blocks in device memory: the pools that this process owns, and scratch.

A pool is one plain allocation: its blocks, and behind them a page that says what the memory is, as a pool in host memory has. It
is zeroed when it is made. Nothing here looks at what is in the blocks but to copy and to sum it.

Owner and reader run on streams that know nothing of each other. What a reader may read is complete before the reader hears of it:
the owner names a block only with its checksum, and has that from the device. The pool's interprocess event says the same to the
driver: it is recorded when checksums have come back, on a stream of the pool's own, where no work of the owner's is ahead of it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gpu.cuda.driver import Driver
from gpu.cuda.handle import LABEL_BYTES, MEMORY, NO_LABEL, PAGE_BYTES, UNSHARED, Handle, label, memory_size
from gpu.cuda.mapping import MappedCudaPool
from gpu.cuda.memory import DeviceMemory
from gpu.cuda.mover import Mover, rows_of
from gpu.cuda.processes import Processes
from gpu.deferred import Deferred, Now
from gpu.errors import BrokenPool, CannotMap, DeviceFailed, LayoutMismatch, PoolClosed
from gpu.pool import Blocks, PoolExport, PoolSpec, check_copy, check_ids

_ALIGNMENT = 16  # what the copy kernel moves at a time


class CudaPool:
    """Blocks that this process owns and writes."""

    is_host = False

    def __init__(self, driver: Driver, mover: Mover, processes: Processes, spec: PoolSpec) -> None:
        """Waits until the memory is zeroed. Raises OutOfMemory, ValueError for blocks that are not multiples of 16 bytes."""
        if spec.block_bytes % _ALIGNMENT:
            raise ValueError(f"blocks in device memory are multiples of {_ALIGNMENT} bytes, and {spec.block_bytes} is none")
        self.kind = spec.kind
        self.layout = spec.layout
        self.num_blocks = spec.num_blocks
        self.block_bytes = spec.block_bytes
        self.generation = secrets.randbits(63)
        self._driver = driver
        self._mover = mover
        self._processes = processes
        self._label = label(self.generation, self.layout, self.num_blocks, self.block_bytes)
        self._memory: DeviceMemory | None = DeviceMemory(driver, memory_size(spec.num_blocks, spec.block_bytes))
        self._bytes = self._memory.tensor()
        self.stream = driver.create_stream(driver.priorities()[1])
        self._event: int | None = None  # once it is exported
        driver.fill(self._memory.address, 0, self._memory.size, self.stream)
        self._write_label(self._memory, self._label)
        self._export: PoolExport | None = None

    @property
    def blocks(self) -> Tensor:
        """All blocks, uint8 [num_blocks, block_bytes]."""
        self._opened()
        return self._bytes[: self.num_blocks * self.block_bytes].view(self.num_blocks, self.block_bytes)

    def array(self, dtype: torch.dtype, block_shape: Sequence[int]) -> Tensor:
        """The blocks as [num_blocks, *block_shape]. Raises ValueError unless `block_shape` of `dtype` fills a block."""
        wanted = math.prod(block_shape) * dtype.itemsize
        if wanted != self.block_bytes:
            raise ValueError(f"blocks of {tuple(block_shape)} {dtype} take {wanted} bytes, and here they have {self.block_bytes}")
        return self.blocks.view(dtype).view(self.num_blocks, *block_shape)

    def checksum(self, block_ids: Sequence[int]) -> Now[list[int]]:
        """sum64 of each whole block, on the calling thread's stream. When it has come, readers may read these blocks."""
        sums = self._mover.checksum(self.blocks, block_ids)
        return _Told(self, sums) if isinstance(sums, Deferred) else sums

    def read(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of blocks that are complete, in pinned memory. Waits until they are there, not until other work is done."""
        blocks = self.blocks
        self._driver.use()
        return self._mover.download(blocks, block_ids, self.stream)

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> Now[int]:
        check_copy(src, self, src_ids, dst_ids, checksums)
        return _copy(self._mover, src, src_ids, self.blocks, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> CudaLanding:
        return CudaLanding(self._mover, self.blocks, block_ids)

    def export(self) -> PoolExport:
        """Where CUDA has no handles for others, what is exported says so, and whoever would map it finds another way."""
        memory = self._opened()
        if self._export is None:
            self._driver.use()
            kind, handle = self._share(memory)
            self._export = PoolExport(
                memory=kind,
                handle=handle,
                num_blocks=self.num_blocks,
                block_bytes=self.block_bytes,
                generation=self.generation,
                layout=self.layout,
            )
        return self._export

    def check_integrity(self) -> None:
        """Raises BrokenPool when something wrote past the blocks. Asks the device, and waits for no other work on it."""
        memory = self._opened()
        self._driver.use()
        end = self.num_blocks * self.block_bytes
        tail = self._mover.pinned.take(memory.size - end)
        self._driver.copy_to_host(tail, memory.address + end, self.stream)
        self._driver.synchronize(self.stream)
        label_at = len(tail) - PAGE_BYTES
        if tail[label_at : label_at + LABEL_BYTES].tobytes() != self._label:
            raise BrokenPool(f"the last page of this {self.kind} pool was overwritten")
        if tail[:label_at].any() or tail[label_at + LABEL_BYTES :].any():
            raise BrokenPool(f"something wrote past the last block of this {self.kind} pool")

    def tell_readers(self) -> None:
        """Record that what was written until now is complete."""
        if self._memory is not None and self._event is not None:
            self._driver.record(self._event, self.stream)

    def close(self) -> None:
        """Say to those who have it mapped that it is over, and let go. Tensors over it stay valid until they are dropped."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        self._bytes = torch.empty(0, dtype=torch.uint8)
        with suppress(DeviceFailed):  # of a lost context nothing can be freed
            self._driver.use()
            self._write_label(memory, NO_LABEL)
            if self._event is not None:
                self._driver.destroy_event(self._event)
            self._driver.destroy_stream(self.stream)

    def _share(self, memory: DeviceMemory) -> tuple[str, bytes]:
        try:
            self._event = self._driver.create_event(interprocess=True)
            handle = Handle(
                boot_id=self._processes.boot_id,
                device=self._driver.info.uuid,
                process=self._processes.own,
                size=memory.size,
                memory=self._driver.export_memory(memory.address),
                event=self._driver.export_event(self._event),
            )
        except CannotMap as error:
            return UNSHARED, str(error).encode()
        return MEMORY, handle.pack()

    def _opened(self) -> DeviceMemory:
        if self._memory is None:
            raise PoolClosed(f"this {self.kind} pool has been closed")
        return self._memory

    def _write_label(self, memory: DeviceMemory, written: bytes) -> None:
        host = self._mover.pinned.take(LABEL_BYTES)
        host[:] = list(written)
        self._driver.copy_to_device(memory.address + memory.size - PAGE_BYTES, host, self.stream)
        self._driver.synchronize(self.stream)


class CudaScratch:
    """Blocks from torch's allocator, for this process and a short while."""

    def __init__(self, mover: Mover, blocks: Tensor, dtype: torch.dtype) -> None:
        """`blocks`: uint8 [num_blocks, block_bytes]."""
        self.num_blocks, self.block_bytes = blocks.shape
        self.blocks = blocks
        self._mover = mover
        self._dtype = dtype

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> Now[int]:
        check_copy(src, self, src_ids, dst_ids, checksums)
        return _copy(self._mover, src, src_ids, self.blocks, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> CudaLanding:
        return CudaLanding(self._mover, self.blocks, block_ids)

    def rows(self, width: int) -> Tensor:
        """All blocks as rows [n, width]."""
        return self.blocks.view(self._dtype).view(-1, width)


class CudaLanding:
    """Pinned memory, which is the nearest that a socket comes to a device."""

    def __init__(self, mover: Mover, blocks: Tensor, block_ids: Sequence[int]) -> None:
        self._mover = mover
        self._blocks = blocks
        self._ids = check_ids(block_ids, len(blocks)).tolist()
        self._bytes = mover.pinned.take(len(self._ids) * blocks.shape[1])
        self.buffers = rows_of(self._bytes, blocks.shape[1])

    def settle(self, checksums: Sequence[int]) -> Now[int]:
        return self._mover.upload(self._bytes, self._blocks, self._ids, checksums)


class _Told(Deferred[list[int]]):
    """Checksums, after which readers are told."""

    def __init__(self, pool: CudaPool, sums: Deferred[list[int]]) -> None:
        self._pool = pool
        self._sums = sums

    def value(self) -> list[int]:
        self._pool.tell_readers()
        return self._sums.value()


def _copy(
    mover: Mover, src: Blocks, src_ids: Sequence[int], dst: Tensor, dst_ids: Sequence[int], checksums: Sequence[int]
) -> Now[int]:
    if isinstance(src, CudaPool):
        return mover.copy(src.blocks, src_ids, dst, dst_ids, checksums)
    if isinstance(src, MappedCudaPool):
        return src.copy_to(dst, src_ids, dst_ids, checksums)
    raise LayoutMismatch(f"{type(src).__name__} is not in device memory")
