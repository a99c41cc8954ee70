"""The driver on a real device: CuPy's runtime calls, with torch on the same primary context. Nothing else imports cupy.

Memory comes from cudaMalloc, not from CuPy's or torch's allocator: a handle for another process is always of a whole allocation.
"""

from __future__ import annotations

import os
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from gpu.cuda.driver import DeviceInfo, HostBytes
from gpu.errors import CannotMap, DeviceFailed, OutOfMemory, UnknownDevice

_SUCCESS, _OUT_OF_MEMORY, _NOT_READY = 0, 2, 600  # cudaError_t
_BELOW_ALL_PRIORITIES = -1000  # CUDA takes the greatest there is for it
_MAX_QUEUES = "32"  # CUDA's most

_idle_streams: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # by device and priority


class CupyDriver:
    """Device `index` of those that CUDA_VISIBLE_DEVICES shows."""

    def __init__(self, index: int) -> None:
        """Raises UnknownDevice, saying what is missing."""
        # Streams that share one of the device's queues wait for each other, and by default there are eight.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", _MAX_QUEUES)
        self._cupy = _import_cupy()
        self._runtime: Any = self._cupy.cuda.runtime
        self._error: type[Exception] = self._runtime.CUDARuntimeError
        self._index = index
        self._require_device()
        self.torch_device = torch.device("cuda", index)
        self.use()
        properties = torch.cuda.get_device_properties(index)
        self.info = DeviceInfo(
            name=properties.name,
            uuid=_uuid_of(index),  # CuPy's own ends at the first zero byte
            capability=(properties.major, properties.minor),
            num_multiprocessors=properties.multi_processor_count,
            total_bytes=properties.total_memory,
        )
        self._priority_of: dict[int, int] = {}  # of the streams that are in use
        probe = self.create_stream(_BELOW_ALL_PRIORITIES)
        self._greatest_priority = int(self._torch_stream(probe).priority)
        self.destroy_stream(probe)

    def use(self) -> None:
        self._call(self._runtime.setDevice, self._index)

    # --- memory -------------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        return int(self._call(self._runtime.memGetInfo)[0])

    def allocate(self, size: int) -> int:
        try:
            return int(self._runtime.malloc(size))
        except self._error as error:
            if _status(error) == _OUT_OF_MEMORY:
                raise OutOfMemory(size, self.free_bytes()) from error
            raise DeviceFailed(str(error)) from error

    def free(self, address: int) -> None:
        self.use()  # a finalizer may run on any thread
        self._call(self._runtime.free, address)

    def allocate_host(self, size: int) -> int:
        return int(self._call(self._runtime.hostAlloc, size, self._runtime.hostAllocPortable))

    def free_host(self, address: int) -> None:
        self.use()
        self._call(self._runtime.freeHost, address)

    def tensor(self, address: int, size: int, owner: object) -> torch.Tensor:
        memory = self._cupy.cuda.UnownedMemory(address, size, owner, self._index)
        array = self._cupy.ndarray((size,), self._cupy.uint8, self._cupy.cuda.MemoryPointer(memory, 0))
        return from_dlpack(array)  # takes the device it is told, also for memory that lies on a peer of it

    def borrow(self, size: int, streams: tuple[int, ...] = ()) -> torch.Tensor:
        try:
            tensor = torch.empty(size, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory(size, self.free_bytes()) from error
        for stream in streams:
            tensor.record_stream(self._torch_stream(stream))
        return tensor

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        self._call(self._runtime.memsetAsync, address, value, size, stream)

    def copy_to_device(self, address: int, src: HostBytes, stream: int) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._call(self._runtime.memcpyAsync, address, src.ctypes.data, src.nbytes, kind, stream)

    def copy_to_host(self, dst: HostBytes, address: int, stream: int) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._call(self._runtime.memcpyAsync, dst.ctypes.data, address, dst.nbytes, kind, stream)

    # --- order --------------------------------------------------------------------------------------------------------

    def priorities(self) -> tuple[int, int]:
        return 0, self._greatest_priority

    def create_stream(self, priority: int) -> int:
        idle = _idle_streams[self._index, priority]
        stream = idle.pop() if idle else self._new_stream(priority)
        self._priority_of[stream] = priority
        return stream

    def destroy_stream(self, stream: int) -> None:
        """Keep it for the next who asks. Torch marks the streams that used some memory when that is let go, maybe later."""
        _idle_streams[self._index, self._priority_of.pop(stream)].append(stream)

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        with torch.cuda.stream(self._torch_stream(stream)):
            yield

    def current_stream(self) -> int:
        return int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def synchronize(self, stream: int) -> None:
        """By an event: the stream's own call would spin."""
        event = self.create_event()
        try:
            self.record(event, stream)
            self.wait(event)
        finally:
            self.destroy_event(event)

    def create_event(self, *, interprocess: bool = False) -> int:
        flags = self._runtime.eventDisableTiming | self._runtime.eventBlockingSync
        if interprocess:
            return int(self._share(self._runtime.eventCreateWithFlags, flags | self._runtime.eventInterprocess))
        return int(self._call(self._runtime.eventCreateWithFlags, flags))

    def destroy_event(self, event: int) -> None:
        self._call(self._runtime.eventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        self._call(self._runtime.eventRecord, event, stream)

    def is_done(self, event: int) -> bool:
        status = int(self._runtime.eventQuery(event))  # returns its status instead of raising it
        if status not in (_SUCCESS, _NOT_READY):
            raise DeviceFailed(str(self._error(status)))
        return status == _SUCCESS

    def wait(self, event: int) -> None:
        self._call(self._runtime.eventSynchronize, event)

    # --- between processes --------------------------------------------------------------------------------------------

    def can_access(self, uuid: bytes) -> bool | None:
        for other in range(torch.cuda.device_count()):
            if _uuid_of(other) == uuid:
                return other == self._index or bool(self._call(self._runtime.deviceCanAccessPeer, self._index, other))
        return None

    def export_memory(self, address: int) -> bytes:
        return bytes(self._share(self._runtime.ipcGetMemHandle, address))

    def open_memory(self, handle: bytes) -> int:
        return self._open(self._runtime.ipcOpenMemHandle, handle)

    def close_memory(self, address: int) -> None:
        self._call(self._runtime.ipcCloseMemHandle, address)

    def export_event(self, event: int) -> bytes:
        return bytes(self._share(self._runtime.ipcGetEventHandle, event))

    def open_event(self, handle: bytes) -> int:
        return self._open(self._runtime.ipcOpenEventHandle, handle)

    # --- torch and errors ---------------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._error as error:
            raise DeviceFailed(str(error)) from error

    def _new_stream(self, priority: int) -> int:
        """CuPy has priorities from version 14. Before, it is one of the 32 streams that torch has of each of four priorities."""
        if hasattr(self._runtime, "streamCreateWithPriority"):
            return int(self._call(self._runtime.streamCreateWithPriority, self._runtime.streamNonBlocking, priority))
        return int(torch.cuda.Stream(self.torch_device, priority).cuda_stream)

    def _share(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Containers, virtual machines and WSL may come without handles between processes."""
        try:
            return function(*arguments)
        except self._error as error:
            raise CannotMap(f"CUDA cannot share device memory here: {error}") from error

    def _torch_stream(self, stream: int) -> torch.cuda.Stream:
        return torch.cuda.ExternalStream(stream, device=self.torch_device)

    def _open(self, function: Callable[[bytes], Any], handle: bytes) -> int:
        try:
            return int(function(handle))
        except self._error as error:
            raise CannotMap(f"CUDA cannot open what another process has exported: {error}") from error

    def _require_device(self) -> None:
        """Ask before anything is made: what CuPy fails to make complains again when it is collected."""
        if not self._runtime.driverGetVersion():
            raise UnknownDevice("no CUDA device: there is no NVIDIA driver on this machine")
        try:
            count = self._runtime.getDeviceCount()
        except self._error as error:
            raise UnknownDevice(f"no CUDA device: {error}") from error
        if self._index >= count:
            raise UnknownDevice(f"no CUDA device {self._index}: there are {count}, numbered from 0")
        if torch.version.cuda is None:
            raise UnknownDevice(f"no CUDA device: this torch, {torch.__version__}, is built without CUDA")
        if not torch.cuda.is_available():
            raise UnknownDevice(f"no CUDA device: torch {torch.__version__} for CUDA {torch.version.cuda} does not find one")


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise UnknownDevice(f"no CUDA device: CuPy cannot be imported ({error}); install epd[cuda12] or epd[cuda13]") from error
    return cupy


def _uuid_of(index: int) -> bytes:
    text = str(torch.cuda.get_device_properties(index).uuid)
    return uuid.UUID(text.removeprefix("GPU-").removeprefix("MIG-")).bytes


def _status(error: Exception) -> int:
    return int(getattr(error, "status", -1))
