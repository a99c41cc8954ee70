"""What can go wrong in device memory. A caller decides what each of these means for its request."""

from __future__ import annotations


class GpuError(Exception):
    """Base of all errors that this package raises on purpose."""


class UnknownDevice(GpuError):
    """No backend of that name opens here."""


class OutOfMemory(GpuError):
    """A pool is larger than the memory that is left. Carries both figures, in bytes."""

    def __init__(self, wanted_bytes: int, available_bytes: int) -> None:
        wanted, available = wanted_bytes / 1e9, available_bytes / 1e9
        super().__init__(f"a pool of {wanted:.2f} GB was asked for and {available:.2f} GB are left: use fewer blocks")
        self.wanted_bytes = wanted_bytes
        self.available_bytes = available_bytes


class CannotMap(GpuError):
    """Another process's pool cannot be mapped: it is gone, on another host, not ours to read, or not the pool that was named."""


class PoolClosed(GpuError):
    """The pool's owner has closed it."""


class BrokenPool(GpuError):
    """check_integrity() found memory that is not what its owner laid out."""


class LayoutMismatch(GpuError):
    """Two pools whose blocks do not mean the same thing."""


class StreamClosed(GpuError):
    """Work was given to a stream that has been closed, or was still waiting when it was."""


class DeviceFailed(GpuError):
    """The device stopped on an error. Its context is lost, and all device memory of this process, which has to start anew."""
