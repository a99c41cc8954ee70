"""What the CUDA backend needs of a driver, and no more: device memory, pinned memory, streams, events, handles between processes.

`gpu.cuda.cupy_driver` is the real one. Everything above it is written against this interface, so that it runs without a device in
tests. One driver is one device. Addresses, streams and events are the numbers that CUDA knows them by.

Where nothing else is said a call raises DeviceFailed when CUDA answers with an error: nothing here is expected to fail.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

HostBytes = npt.NDArray[np.uint8]  # [n], contiguous
IPC_HANDLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What does not change about a device."""

    name: str  # "NVIDIA H200"
    uuid: bytes  # 16; the same in all processes, whatever number they know the device by
    capability: tuple[int, int]
    num_multiprocessors: int
    total_bytes: int


class Driver(Protocol):
    @property
    def info(self) -> DeviceInfo: ...

    @property
    def torch_device(self) -> torch.device: ...

    def use(self) -> None:
        """Make this the calling thread's device. Comes first on each thread."""

    # --- memory -------------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Device memory that an allocation could still take."""

    def allocate(self, size: int) -> int:
        """The address of a plain allocation of its own, which can be exported. Raises OutOfMemory with both figures."""

    def free(self, address: int) -> None:
        """May wait for all work on the device."""

    def allocate_host(self, size: int) -> int:
        """The address of pinned host memory, which the device can copy from and to while the host goes on."""

    def free_host(self, address: int) -> None: ...

    def tensor(self, address: int, size: int, owner: object) -> torch.Tensor:
        """Bytes of the device as uint8 [size], not copied. `owner` lives for as long as a tensor over them does."""

    def borrow(self, size: int, streams: tuple[int, ...] = ()) -> torch.Tensor:
        """uint8 [size] from torch's allocator, for a short while and for this process only. Raises OutOfMemory.

        For use on the thread's current stream and on `streams`: when its last tensor is dropped, the memory is given to nobody
        else before they have finished what they were given until then.
        """

    def fill(self, address: int, value: int, size: int, stream: int) -> None: ...

    def copy_to_device(self, address: int, src: HostBytes, stream: int) -> None:
        """Returns at once. `src` is pinned and stays as it is until the stream has passed this point."""

    def copy_to_host(self, dst: HostBytes, address: int, stream: int) -> None:
        """Returns at once. `dst` is pinned and may be read when the stream has passed this point."""

    # --- order --------------------------------------------------------------------------------------------------------

    def priorities(self) -> tuple[int, int]:
        """The least and the greatest priority of a stream. Lower numbers go first."""

    def create_stream(self, priority: int) -> int:
        """One that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None: ...

    def on_stream(self, stream: int) -> AbstractContextManager[None]:
        """Within it, kernels and torch's operations of the calling thread go to this stream."""

    def current_stream(self) -> int:
        """The calling thread's."""

    def synchronize(self, stream: int) -> None:
        """Block until the stream has done all it was given, without the interpreter's lock."""

    def create_event(self, *, interprocess: bool = False) -> int:
        """One whose wait blocks the thread and does not spin. Raises CannotMap where none can be `interprocess`."""

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def is_done(self, event: int) -> bool:
        """Whether the event's latest record has been passed; also when it was never recorded."""

    def wait(self, event: int) -> None:
        """Block until the event's latest record has been passed, without the interpreter's lock."""

    # --- between processes --------------------------------------------------------------------------------------------

    def can_access(self, uuid: bytes) -> bool | None:
        """Whether the device can read the memory of another one. None: no device of that name is visible here."""

    def export_memory(self, address: int) -> bytes:
        """A handle of IPC_HANDLE_BYTES of the whole allocation at `address`. Raises CannotMap where there are none."""

    def open_memory(self, handle: bytes) -> int:
        """Where another process's allocation can be read from. Raises CannotMap."""

    def close_memory(self, address: int) -> None:
        """May wait for all work on the device."""

    def export_event(self, event: int) -> bytes:
        """Raises CannotMap as above."""

    def open_event(self, handle: bytes) -> int:
        """Another process's event. Raises CannotMap."""
