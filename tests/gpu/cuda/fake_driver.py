"""A CUDA driver without a device: its memory is the host's, its streams go only as far as a test lets them.

What is given to a stream is done in order, by whoever gives it, unless the stream is held: then it waits until the test lets it
go on, as work waits on a device. Memory and events lie in memfds, so that several of these, in one process or in several, can
open what another has exported, and keep what they have opened when the other ends.

It is strict where a real driver is treacherous: a thread that has not said that it uses the device is refused, as is memory that
was freed; and what is left at the end is listed.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu.cuda.backend import CudaBackend
from gpu.cuda.driver import IPC_HANDLE_BYTES, DeviceInfo, HostBytes
from gpu.cuda.processes import HostProcesses, Processes, ProcessId
from gpu.cuda.reference import TorchKernels
from gpu.errors import CannotMap, DeviceFailed, OutOfMemory

_HANDLE = struct.Struct("<qqQ")  # process, descriptor, inode
_KEPT_BORROWED_BYTES = 64 << 20
_EVENT_BYTES = 16


class FakeDriver:
    """One device as one process sees it."""

    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        total_bytes: int = 1 << 30,
        uuid: bytes = b"fake device 0000",
        capability: tuple[int, int] = (9, 0),
        peers: dict[bytes, bool] | None = None,
    ) -> None:
        """`peers`: the other devices that are visible, by uuid, and whether they can be accessed."""
        self.info = DeviceInfo("Fake GPU", uuid, capability, 132, total_bytes)
        self._peers = {uuid: True, **(peers or {})}
        self._state = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._thread = threading.local()
        self._own: dict[int, _Shared] = {}
        self._opened: dict[int, _Shared] = {}  # by address
        self._host: dict[int, HostBytes] = {}
        self._streams: dict[int, _Stream] = {0: _Stream()}
        self._events: dict[int, _Event] = {}
        self._graves: list[_Shared] = []  # freed, but work that was given before may still come to it
        self._borrowed: deque[HostBytes] = deque()
        self._failure: str | None = None
        self.calls: Counter[str] = Counter()
        self.borrowed_for: list[tuple[int, ...]] = []
        self.pinned_sizes: list[int] = []

    # --- for tests ----------------------------------------------------------------------------------------------------

    def hold(self, stream: int | None = None) -> None:
        """Let this stream, or all that there are, do nothing of what it is given from now on."""
        with self._state:
            for each in self._some(stream):
                each.is_held = True

    def release(self, stream: int | None = None) -> None:
        """Let it go on, first with all that it was given meanwhile."""
        with self._state:
            for each in self._some(stream):
                each.is_held = False
                self._advance(each)

    def step(self, stream: int) -> None:
        """Let a held stream do the next thing."""
        with self._state:
            self._streams[stream].work.popleft()()
            self._state.notify_all()

    def num_waiting(self, stream: int) -> int:
        """How many things a stream was given and has not done."""
        with self._state:
            return len(self._streams[stream].work)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something that a stream or an event does makes it true."""
        with self._state:
            assert self._state.wait_for(condition, timeout=60)

    def fail(self, error: str = "cudaErrorIllegalAddress: an illegal memory access was encountered") -> None:
        """From now on the context is lost."""
        with self._state:
            self._failure = error
            self._state.notify_all()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def end(self) -> None:
        """As if the process had been killed: what was exported cannot be opened any more, what others have open stays."""
        with self._state:
            for stream in self._streams.values():
                stream.is_held = True
            for shared in [*self._own.values(), *(event.shared for event in self._events.values() if event.is_own)]:
                shared.close_descriptor()

    def left(self) -> dict[str, int]:
        """What was made and not given back."""
        counts = {
            "memory": len(self._own),
            "opened": sum(shared.num_users for shared in self._opened.values()),
            "pinned": len(self._host),
            "streams": len(self._streams) - 1,
            "events": len(self._events),
        }
        return {name: count for name, count in counts.items() if count}

    def bytes_at(self, address: int, size: int) -> HostBytes:
        return _bytes(address, size)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        with self._state:
            self._require()
            each = self._streams[stream]
            each.work.append(work)
            self._advance(each)
            self._state.notify_all()

    # --- Driver -------------------------------------------------------------------------------------------------------

    def use(self) -> None:
        self._thread.uses = True
        self._require()

    def free_bytes(self) -> int:
        self._require()
        return self.info.total_bytes - sum(shared.size for shared in self._own.values())

    def allocate(self, size: int) -> int:
        self._require()
        if size > (free := self.free_bytes()):
            raise OutOfMemory(size, free)
        shared = _Shared.make(size)
        shared.memory[:] = 0xCC
        self._own[shared.address] = shared
        return shared.address

    def free(self, address: int) -> None:
        shared = self._own.pop(address)
        shared.close_descriptor()
        self._graves.append(shared)

    def allocate_host(self, size: int) -> int:
        self.pinned_sizes.append(size)
        memory = np.full(size, 0xAA, np.uint8)
        self._host[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free_host(self, address: int) -> None:
        del self._host[address]

    def tensor(self, address: int, size: int, owner: object) -> Tensor:
        return torch.from_numpy(_bytes(address, size, owner))

    def borrow(self, size: int, streams: tuple[int, ...] = ()) -> Tensor:
        assert set(streams) <= set(self._streams)
        self.borrowed_for.append(streams)
        memory = np.full(size, 0xBB, np.uint8)
        with self._state:  # torch keeps dropped memory until the streams have passed; here it is kept for long enough
            self._borrowed.append(memory)
            while sum(len(each) for each in self._borrowed) > _KEPT_BORROWED_BYTES and len(self._borrowed) > 1:
                self._borrowed.popleft()
        return torch.from_numpy(memory)

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        self._inside(address, size)
        self.enqueue(stream, lambda: _bytes(address, size).fill(value))

    def copy_to_device(self, address: int, src: HostBytes, stream: int) -> None:
        self._inside(address, len(src))
        self.calls["copy_to_device"] += 1
        self.enqueue(stream, lambda: np.copyto(_bytes(address, len(src)), src))

    def copy_to_host(self, dst: HostBytes, address: int, stream: int) -> None:
        self._inside(address, len(dst))
        self.calls["copy_to_host"] += 1
        self.enqueue(stream, lambda: np.copyto(dst, _bytes(address, len(dst))))

    def priorities(self) -> tuple[int, int]:
        return 0, -5

    def create_stream(self, priority: int) -> int:
        self._require()
        with self._state:
            number = next(self._numbers)
            self._streams[number] = _Stream(priority)
            return number

    def destroy_stream(self, stream: int) -> None:
        self._require()
        del self._streams[stream]

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        self._thread.stream = stream
        yield
        del self._thread.stream

    def current_stream(self) -> int:
        return int(getattr(self._thread, "stream", 0))

    def synchronize(self, stream: int) -> None:
        event = self.create_event()
        self.record(event, stream)
        self.wait(event)
        self.destroy_event(event)

    def create_event(self, *, interprocess: bool = False) -> int:
        self._require()
        number = next(self._numbers)
        self._events[number] = _Event(_Shared.make(_EVENT_BYTES))
        return number

    def destroy_event(self, event: int) -> None:
        self._require()
        self._events.pop(event).shared.close_descriptor()

    def record(self, event: int, stream: int) -> None:
        with self._state:
            self._require()
            counts = self._events[event].counts
            counts[0] += 1
            mark = int(counts[0])
            self.enqueue(stream, lambda: counts.__setitem__(1, mark))

    def is_done(self, event: int) -> bool:
        self._require()
        counts = self._events[event].counts
        return bool(counts[1] >= counts[0])

    def wait(self, event: int) -> None:
        with self._state:
            self._require()
            counts = self._events[event].counts
            self._state.wait_for(lambda: self._failure is not None or counts[1] >= counts[0])
            self._require()

    def can_access(self, uuid: bytes) -> bool | None:
        return self._peers.get(uuid)

    def export_memory(self, address: int) -> bytes:
        return self._own[address].handle()

    def open_memory(self, handle: bytes) -> int:
        self._require()
        shared = _Shared.open(handle)
        for known in self._opened.values():  # as CUDA does: the same address again
            if known.inode == shared.inode and known.num_users:
                known.num_users += 1
                return known.address
        shared.num_users = 1
        self._opened[shared.address] = shared
        return shared.address

    def close_memory(self, address: int) -> None:
        self._require()
        shared = self._opened[address]
        shared.num_users -= 1
        if not shared.num_users:
            self._graves.append(self._opened.pop(address))
        with self._state:
            self._state.notify_all()

    def export_event(self, event: int) -> bytes:
        return self._events[event].shared.handle()

    def open_event(self, handle: bytes) -> int:
        self._require()
        number = next(self._numbers)
        self._events[number] = _Event(_Shared.open(handle), is_own=False)
        return number

    # ------------------------------------------------------------------------------------------------------------------

    def _require(self) -> None:
        assert getattr(self._thread, "uses", False), "this thread has not said that it uses the device"
        if self._failure is not None:
            raise DeviceFailed(self._failure)

    def _inside(self, address: int, size: int) -> None:
        """Device memory that is there: a real device would find an illegal address, or worse, not."""
        with self._state:
            held = [*self._own.values(), *self._opened.values()]
            spans = [(each.address, each.size) for each in held] + [(each.ctypes.data, len(each)) for each in self._borrowed]
        assert any(start <= address and address + size <= start + length for start, length in spans), "not device memory"

    def _advance(self, stream: _Stream) -> None:
        while stream.work and not stream.is_held and self._failure is None:
            stream.work.popleft()()
        self._state.notify_all()

    def _some(self, stream: int | None) -> list[_Stream]:
        return list(self._streams.values()) if stream is None else [self._streams[stream]]


class InOrderKernels(TorchKernels):
    """The kernels that move blocks, on the fake's streams: they run when the stream comes to them, not when they are launched.

    As on a device, what was launched keeps no memory alive.
    """

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver

    def copy_blocks(self, src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
        launch = super().copy_blocks
        unowned = [None if each is None else _unowned(each) for each in (src, src_ids, dst, dst_ids, sums)]
        self._driver.enqueue(self._driver.current_stream(), lambda: launch(*unowned))  # type: ignore[arg-type]

    def hash_blocks(self, src: Tensor, ids: Tensor, sums: Tensor) -> None:
        launch = super().hash_blocks
        unowned = [_unowned(each) for each in (src, ids, sums)]
        self._driver.enqueue(self._driver.current_stream(), lambda: launch(*unowned))


@dataclass
class FakeProcesses:
    """Processes of a host that are in fact one: who has ended is what the test says."""

    own: ProcessId
    boot_id: bytes = b"fake host 000000"
    ended: set[ProcessId] = field(default_factory=set)

    def is_alive(self, process: ProcessId) -> bool:
        return process not in self.ended


def fake_backend(
    driver: FakeDriver | None = None, *, dtype: torch.dtype = torch.bfloat16, processes: Processes | None = None
) -> CudaBackend:
    """The CUDA backend over a fake, of this process unless `processes` say otherwise."""
    driver = driver or FakeDriver()
    driver.use()
    return CudaBackend(driver, InOrderKernels(driver), dtype=dtype, processes=processes or HostProcesses())


@dataclass
class _Stream:
    priority: int = 0
    work: deque[Callable[[], None]] = field(default_factory=deque)
    is_held: bool = False


class _Shared:
    """Memory that another process, or another fake, can open."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.inode = os.fstat(fd).st_ino
        self.memory = np.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_SHARED), np.uint8)
        self.address = int(self.memory.ctypes.data)
        self.num_users = 0

    @classmethod
    def make(cls, size: int) -> _Shared:
        fd = os.memfd_create("fake-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, size)

    @classmethod
    def open(cls, handle: bytes) -> _Shared:
        assert len(handle) == IPC_HANDLE_BYTES
        pid, fd, inode = _HANDLE.unpack_from(handle)
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CannotMap(f"cudaErrorInvalidResourceHandle: {error}") from error
        found = os.fstat(own)
        if found.st_ino != inode:
            os.close(own)
            raise CannotMap("cudaErrorInvalidResourceHandle: it is something else now")
        shared = cls(own, found.st_size)
        shared.close_descriptor()
        return shared

    def handle(self) -> bytes:
        return _HANDLE.pack(os.getpid(), self.fd, self.inode).ljust(IPC_HANDLE_BYTES, b"\0")

    def close_descriptor(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class _Event:
    shared: _Shared
    is_own: bool = True

    @property
    def counts(self) -> npt.NDArray[np.uint64]:
        """How often it was recorded, and the last of these that was reached."""
        return self.shared.memory[:_EVENT_BYTES].view(np.uint64)


def _unowned(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return torch.from_numpy(_bytes(tensor.data_ptr(), tensor.nbytes)).view(tensor.dtype).view(tensor.shape)


def _bytes(address: int, size: int, owner: object = None) -> HostBytes:
    memory = (ctypes.c_uint8 * size).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return np.frombuffer(memoryview(memory), np.uint8)
