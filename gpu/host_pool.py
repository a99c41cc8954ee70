"""A pool in host memory: a memfd, which other processes on the host map.

After the last block lies a page that says what the memory is. Whoever maps a pool compares it with the handle it was given, so
that a descriptor number that now means something else is noticed. The owner clears it when it closes the pool. The checksum of a
block is its XXH3-64.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpu.errors import BrokenPool, CannotMap, LayoutMismatch, OutOfMemory, PoolClosed
from gpu.memory import Bytes, SharedMemory, available_bytes, map_shared
from gpu.pool import Blocks, PoolExport, PoolSpec, check_copy, check_ids

Ids = npt.NDArray[np.int64]

MEMORY = "memfd"
_HANDLE = struct.Struct("<qqQ")  # process, descriptor, inode
_LABEL = struct.Struct("<8sQQQQ")  # magic, generation, layout, num_blocks, block_bytes
_MAGIC = b"epd pool"
_NO_LABEL = bytes(_LABEL.size)


class Mover(Protocol):
    """Copies and hashes rows of bytes: `gpu.copy`, which is compiled, or `gpu.plain_copy`, which need not be."""

    def copy_checked(self, src: Bytes, src_ids: Ids, dst: Bytes, dst_ids: Ids, checksums: npt.NDArray[np.uint64]) -> int: ...

    def checksum_blocks(self, src: Bytes, src_ids: Ids) -> list[int]: ...


class HostPool:
    """Blocks that this process owns and writes."""

    is_host = True

    def __init__(self, spec: PoolSpec, mover: Mover) -> None:
        """Raises OutOfMemory where the memory is not there to be had."""
        size = _memory_size(spec.num_blocks, spec.block_bytes)
        if size > (left := available_bytes()):
            raise OutOfMemory(size, left)
        self.mover = mover
        self.kind = spec.kind
        self.layout = spec.layout
        self.num_blocks = spec.num_blocks
        self.block_bytes = spec.block_bytes
        self.generation = secrets.randbits(63)
        self.memory = SharedMemory(f"epd-{spec.kind}", size)
        self._label = _LABEL.pack(_MAGIC, self.generation, self.layout, self.num_blocks, self.block_bytes)
        self._write_label(self._label)

    @property
    def blocks(self) -> Bytes:
        """All blocks, uint8 [num_blocks, block_bytes]."""
        if self.memory.fd < 0:
            raise PoolClosed(f"this {self.kind} pool has been closed")
        return _blocks_of(self.memory.bytes, self.num_blocks, self.block_bytes)

    def array(self, dtype: npt.DTypeLike, block_shape: Sequence[int]) -> npt.NDArray[np.generic]:
        """A writable view [num_blocks, *block_shape]. Raises ValueError unless `block_shape` of `dtype` fills a block."""
        wanted = int(np.prod(block_shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if wanted != self.block_bytes:
            raise ValueError(
                f"blocks of {tuple(block_shape)} {np.dtype(dtype)} take {wanted} bytes and this pool's have {self.block_bytes}"
            )
        return self.blocks.view(dtype).reshape(self.num_blocks, *block_shape)

    def block(self, block_id: int) -> memoryview:
        """One block's bytes, writable."""
        check_ids((block_id,), self.num_blocks)
        return memoryview(self.blocks[block_id])

    def checksum(self, block_ids: Sequence[int]) -> list[int]:
        """XXH3-64 of each whole block."""
        return self.mover.checksum_blocks(self.blocks, check_ids(block_ids, self.num_blocks))

    def read(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The blocks themselves."""
        return [self.block(block_id) for block_id in block_ids]

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> int:
        check_copy(src, self, src_ids, dst_ids, checksums)
        return _copy_from(self.mover, src, src_ids, self.blocks, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> HostLanding:
        return HostLanding(self.blocks, block_ids, self.mover)

    def export(self) -> PoolExport:
        if self.memory.fd < 0:
            raise PoolClosed(f"this {self.kind} pool has been closed")
        return PoolExport(
            memory=MEMORY,
            handle=_HANDLE.pack(os.getpid(), self.memory.fd, self.memory.inode),
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
            generation=self.generation,
            layout=self.layout,
        )

    def check_integrity(self) -> None:
        """Raises BrokenPool when the memory is not the one that this pool made, or when something wrote past its blocks."""
        if self.memory.fd < 0:
            raise PoolClosed(f"this {self.kind} pool has been closed")
        found = os.fstat(self.memory.fd)
        if found.st_ino != self.memory.inode or found.st_size != self.memory.size:
            raise BrokenPool(f"descriptor {self.memory.fd} no longer is this {self.kind} pool's memory")
        end = self.num_blocks * self.block_bytes
        tail = self.memory.bytes[end:]
        label_at = len(tail) - mmap.PAGESIZE
        if tail[label_at : label_at + _LABEL.size].tobytes() != self._label:
            raise BrokenPool(f"the last page of this {self.kind} pool was overwritten")
        if tail[:label_at].any() or tail[label_at + _LABEL.size :].any():
            raise BrokenPool(f"something wrote past the last block of this {self.kind} pool")

    def close(self) -> None:
        """Say to those who have it mapped that it is over, and let go. Arrays over it stay valid until they are dropped."""
        if self.memory.fd < 0:
            return
        self._write_label(_NO_LABEL)
        self.memory.close()

    def _write_label(self, label: bytes) -> None:
        at = self.memory.size - mmap.PAGESIZE
        self.memory.bytes[at : at + _LABEL.size] = np.frombuffer(label, dtype=np.uint8)


class MappedHostPool:
    """Another process's pool, to be read. It stays readable when its owner dies; `is_current` says whether that has closed it."""

    def __init__(self, export: PoolExport) -> None:
        """Raises CannotMap unless what is mapped is the pool that `export` names."""
        self.layout = export.layout
        self.num_blocks = export.num_blocks
        self.block_bytes = export.block_bytes
        self.generation = export.generation
        if export.memory != MEMORY or len(export.handle) != _HANDLE.size:
            raise CannotMap(f"a pool of {export.memory} is not host memory")
        pid, fd, inode = _HANDLE.unpack(export.handle)
        self._bytes: Bytes | None = map_shared(pid, fd, inode, _memory_size(export.num_blocks, export.block_bytes))
        self._label = _LABEL.pack(_MAGIC, self.generation, self.layout, self.num_blocks, self.block_bytes)
        if not self.is_current:
            self._bytes = None
            raise CannotMap(f"descriptor {fd} of process {pid} is not the pool of generation {export.generation}")

    @property
    def is_current(self) -> bool:
        """Whether the memory still says that it is the pool that was mapped: so after its owner's death, not after its close."""
        if self._bytes is None:
            return False
        at = len(self._bytes) - mmap.PAGESIZE
        return self._bytes[at : at + _LABEL.size].tobytes() == self._label

    @property
    def blocks(self) -> Bytes:
        """All blocks, uint8 [num_blocks, block_bytes], read-only. Raises PoolClosed when either side has closed it."""
        if self._bytes is None or not self.is_current:
            raise PoolClosed("this mapped pool has been closed")
        return _blocks_of(self._bytes, self.num_blocks, self.block_bytes)

    def block(self, block_id: int) -> memoryview:
        """One block's bytes, read-only."""
        check_ids((block_id,), self.num_blocks)
        return memoryview(self.blocks[block_id])

    def close(self) -> None:
        """Let go. The mapping ends when the last view of a block has gone."""
        self._bytes = None


class HostScratch:
    """Blocks in memory of this process."""

    def __init__(self, num_blocks: int, block_bytes: int, mover: Mover) -> None:
        self._mover = mover
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.blocks: Bytes = np.empty((num_blocks, block_bytes), np.uint8)

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> int:
        check_copy(src, self, src_ids, dst_ids, checksums)
        return _copy_from(self._mover, src, src_ids, self.blocks, dst_ids, checksums)

    def landing(self, block_ids: Sequence[int]) -> HostLanding:
        return HostLanding(self.blocks, block_ids, self._mover)

    def rows(self, width: int) -> npt.NDArray[Any]:
        return self.blocks.view(np.float32).reshape(-1, width)


class HostLanding:
    """The blocks themselves: what a socket receives is where it belongs."""

    def __init__(self, blocks: Bytes, block_ids: Sequence[int], mover: Mover) -> None:
        self._mover = mover
        self._blocks = blocks
        self._ids = check_ids(block_ids, len(blocks))
        self.buffers = [memoryview(blocks[block_id]) for block_id in self._ids]

    def settle(self, checksums: Sequence[int]) -> int:
        found = self._mover.checksum_blocks(self._blocks, self._ids)
        return next((place for place, (is_, should) in enumerate(zip(found, checksums, strict=True)) if is_ != should), -1)


def _copy_from(
    mover: Mover, src: Blocks, src_ids: Sequence[int], dst: Bytes, dst_ids: Sequence[int], checksums: Sequence[int]
) -> int:
    if not isinstance(src, HostPool | MappedHostPool):
        raise LayoutMismatch(f"{type(src).__name__} is not host memory")
    sums = np.asarray(checksums, dtype=np.uint64)
    return mover.copy_checked(src.blocks, check_ids(src_ids, src.num_blocks), dst, np.asarray(dst_ids, dtype=np.int64), sums)


def _blocks_of(memory: Bytes, num_blocks: int, block_bytes: int) -> Bytes:
    return memory[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)


def _memory_size(num_blocks: int, block_bytes: int) -> int:
    """The blocks, rounded up to whole pages, and the page with the label."""
    pages = -(-num_blocks * block_bytes // mmap.PAGESIZE)
    return (pages + 1) * mmap.PAGESIZE
