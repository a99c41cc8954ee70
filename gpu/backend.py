"""The seam between the product and a device: memory, streams and copies. `open_backend` is the only way to one.

A backend is complete: whatever is here works on each of them, held by the same tests.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, Protocol, TypeVar

from gpu.errors import UnknownDevice
from gpu.pool import MappedPool, Pool, PoolExport, PoolSpec

P = ParamSpec("P")
T = TypeVar("T")


class Stream(Protocol):
    """Calls in order, one at a time, off the caller's thread. A future resolves when the device has finished its call's work."""

    def submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One device."""

    name: str  # "cpu"
    torch_device: str  # what torch calls it

    def open_stream(self, name: str, *, priority: int = 0) -> Stream: ...

    def allocate_pool(self, spec: PoolSpec) -> Pool: ...

    def map_pool(self, export: PoolExport) -> MappedPool: ...

    def can_map(self, export: PoolExport) -> bool: ...

    def memory_budget(self) -> int:
        """Bytes that pools can still take."""
        ...

    def close(self) -> None: ...


def open_backend(device: str = "cpu") -> Backend:
    """The backend for a device as the command line names it. Raises UnknownDevice."""
    if device == "cpu":
        from gpu.cpu import CpuBackend

        return CpuBackend()
    raise UnknownDevice(f"no backend for device {device!r} in this installation; there is: cpu")
