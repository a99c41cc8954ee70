"""Other processes' pools in device memory, opened here by their handles: each allocation once, for as long as anybody uses it.

What CUDA says of such memory: it is read through a mapping of its own; a handle that is opened again gives the same address; and
when the owner frees the memory before its readers have closed it, what happens is undefined. Of an owner that ends, or is killed,
it says nothing. So:

- every copy first asks whether the owner lives, and none is launched after it is seen dead or has taken its label off the memory;
- what was under way then is not believed but proven: every block has its checksum, or the copy fails with PoolClosed;
- a mapping is closed when the last copy out of it is over, and by a thread of its own, since closing may wait for the device;
- an owner takes the label off before it frees the memory, and frees it when nobody should have a lease on it any more.

The device never waits for another process's event: of a process that is killed before its event is reached, a waiting stream
would not hear again. The event is asked for instead, and between two questions whether its owner lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from gpu.cuda.driver import Driver
from gpu.cuda.handle import LABEL_BYTES, MEMORY, PAGE_BYTES, UNSHARED, Handle, label, memory_size
from gpu.cuda.mover import Mover
from gpu.cuda.processes import Processes, ProcessId
from gpu.deferred import Deferred, Now
from gpu.errors import CannotMap, DeviceFailed, PoolClosed, StreamClosed
from gpu.pool import PoolExport
from gpu.stream import HostStream

_ASK_AGAIN_S = 50e-6
_OWNER_TIMEOUT_S = 5.0


class Mappings:
    """All that is open in this process."""

    def __init__(self, driver: Driver, mover: Mover, processes: Processes) -> None:
        self._driver = driver
        self._mover = mover
        self._processes = processes
        self._lock = threading.Lock()
        self._open: dict[tuple[ProcessId, bytes], _Mapping] = {}
        self._stream = driver.create_stream(driver.priorities()[1])
        self._closer = HostStream("close mappings")
        self._closer.submit(driver.use)

    def map(self, export: PoolExport) -> MappedCudaPool:
        """Raises CannotMap unless what can be read through the handle is the pool that `export` names."""
        if export.memory == UNSHARED:
            raise CannotMap(f"its owner keeps it to itself: {export.handle.decode(errors='replace')}")
        if export.memory != MEMORY:
            raise CannotMap(f"a pool of {export.memory} is not device memory")
        handle = Handle.unpack(export.handle)
        self._check(handle, export)
        mapped = MappedCudaPool(self, self._mover, export, self._retain(handle))
        if not mapped.is_current:
            mapped.close()
            raise CannotMap(f"device memory of process {handle.process.pid} is not the pool of generation {export.generation:#x}")
        return mapped

    def close(self) -> None:
        """Close all mappings, whoever still has them. May be called again."""
        with self._lock:
            left = list(self._open.values())
            self._open.clear()
        with suppress(StreamClosed):
            for mapping in left:
                self._closer.submit(self._close, mapping)
            self._closer.submit(self._driver.destroy_stream, self._stream).exception()
        self._closer.close()

    # --- for MappedCudaPool -------------------------------------------------------------------------------------------

    def check_owner(self, mapping: _Mapping) -> None:
        """Return when the owner's event has been reached. Raises PoolClosed if it has ended before, or does not get there."""
        asked = time.monotonic()
        while True:
            if not self._processes.is_alive(mapping.owner):
                raise PoolClosed(f"process {mapping.owner.pid}, whose pool this is, has ended")
            if self._driver.is_done(mapping.event):
                return
            if time.monotonic() - asked > _OWNER_TIMEOUT_S:
                raise PoolClosed(f"the device does not get on with the work of process {mapping.owner.pid}")
            time.sleep(_ASK_AGAIN_S)

    def has_label(self, mapping: _Mapping, wanted: bytes) -> bool:
        """Whether the owner lives and its memory still says that it is the pool that was mapped. Waits for the device to tell."""
        if not self._processes.is_alive(mapping.owner):
            return False
        self._driver.use()
        found = self._mover.pinned.take(LABEL_BYTES)
        self._driver.copy_to_host(found, mapping.address + mapping.size - PAGE_BYTES, self._stream)
        self._driver.synchronize(self._stream)
        return found.tobytes() == wanted

    def retain(self, mapping: _Mapping) -> None:
        with self._lock:
            mapping.num_users += 1

    def release(self, mapping: _Mapping) -> None:
        """One user less. With the last the mapping is closed, soon."""
        with self._lock:
            mapping.num_users -= 1
            if mapping.num_users or self._open.get(mapping.key) is not mapping:
                return
            del self._open[mapping.key]
        self._closer.submit(self._close, mapping)

    # --- opening and closing ------------------------------------------------------------------------------------------

    def _check(self, handle: Handle, export: PoolExport) -> None:
        """Raises CannotMap for a handle that need not be tried."""
        pid = handle.process.pid
        if handle.boot_id != self._processes.boot_id:
            raise CannotMap(f"the device memory of process {pid} is on another host")
        if handle.process == self._processes.own:
            raise CannotMap("a process cannot map device memory of its own")
        if not self._processes.is_alive(handle.process):
            raise CannotMap(f"process {pid} has ended, or is in another container")
        if (size := memory_size(export.num_blocks, export.block_bytes)) != handle.size:
            raise CannotMap(f"a pool of {size} bytes cannot be the {handle.size} bytes that process {pid} allocated")
        if self._driver.can_access(handle.device) is False:
            raise CannotMap(f"the device of process {pid} cannot be reached from this one: no peer access")

    def _retain(self, handle: Handle) -> _Mapping:
        """The mapping that there is, or a new one. A device that is not visible here is tried: CUDA may still reach it."""
        key = (handle.process, handle.memory)
        with self._lock:
            mapping = self._open.get(key)
            if mapping is None:
                mapping = self._open[key] = self._open_memory(handle, key)
            mapping.num_users += 1
            return mapping

    def _open_memory(self, handle: Handle, key: tuple[ProcessId, bytes]) -> _Mapping:
        self._driver.use()
        address = self._driver.open_memory(handle.memory)
        try:
            event = self._driver.open_event(handle.event)
        except CannotMap:
            self._driver.close_memory(address)
            raise
        return _Mapping(key, handle.process, address, handle.size, event, self._driver.tensor(address, handle.size, None))

    def _close(self, mapping: _Mapping) -> None:
        with suppress(DeviceFailed):  # of a lost context nothing can be closed
            self._driver.destroy_event(mapping.event)
            self._driver.close_memory(mapping.address)


class MappedCudaPool:
    """Another process's pool, to be copied from. Any number of them share one mapping, which ends with the last."""

    def __init__(self, mappings: Mappings, mover: Mover, export: PoolExport, mapping: _Mapping) -> None:
        """Made by `Mappings.map`; counts as one user of `mapping`."""
        self.layout = export.layout
        self.num_blocks = export.num_blocks
        self.block_bytes = export.block_bytes
        self.generation = export.generation
        self._mappings = mappings
        self._mover = mover
        self._mapping: _Mapping | None = mapping
        self._label = label(self.generation, self.layout, self.num_blocks, self.block_bytes)

    @property
    def is_current(self) -> bool:
        """Whether the owner lives and has not closed the pool. Waits for the device to tell: not for an event loop."""
        mapping = self._mapping
        return mapping is not None and self._mappings.has_label(mapping, self._label)

    def copy_to(self, dst: Tensor, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> Now[int]:
        """`Mover.copy` out of this pool, which stays mapped until that is over.

        Raises PoolClosed, at once or with the result, when either side has closed the pool or its owner has ended: unless every
        block has arrived with its checksum all the same.
        """
        mapping = self._mapping
        if mapping is None:
            raise PoolClosed("this mapped pool has been closed")
        self._mappings.check_owner(mapping)
        self._mappings.retain(mapping)
        try:
            blocks = mapping.memory[: self.num_blocks * self.block_bytes].view(self.num_blocks, self.block_bytes)
            copied = self._mover.copy(blocks, src_ids, dst, dst_ids, checksums)
        except BaseException:
            self._mappings.release(mapping)
            raise
        if isinstance(copied, Deferred):
            return _Proven(copied, self, mapping)
        self._mappings.release(mapping)
        return copied

    def close(self) -> None:
        """Let go. Copies under way are finished first. May be called again."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            self._mappings.release(mapping)

    def finished(self, mapping: _Mapping, wrong: int) -> int:
        """The result of a copy: -1, or the wrong block if it is the pool's and not the remains of one."""
        try:
            if wrong >= 0 and not self._mappings.has_label(mapping, self._label):
                raise PoolClosed(f"the pool of process {mapping.owner.pid} was closed while it was copied from")
            return wrong
        finally:
            self._mappings.release(mapping)


class _Proven(Deferred[int]):
    def __init__(self, copied: Deferred[int], pool: MappedCudaPool, mapping: _Mapping) -> None:
        self._copied = copied
        self._pool = pool
        self._mapping = mapping

    def value(self) -> int:
        return self._pool.finished(self._mapping, self._copied.value())


@dataclass(slots=True)
class _Mapping:
    """One allocation of another process, open here."""

    key: tuple[ProcessId, bytes]
    owner: ProcessId
    address: int
    size: int
    event: int
    memory: Tensor  # uint8 [size]
    num_users: int = 0
