"""Memory of one CUDA process: device memory with an owner, and pinned host memory that is made once and used again.

Both live for as long as anything looks at them: a tensor, an array, a memoryview that a socket is still filling. Nobody has to
say when that is.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict, deque
from contextlib import suppress

import numpy as np
import torch

from gpu.cuda.driver import Driver, HostBytes
from gpu.errors import DeviceFailed

_MIN_PINNED_BYTES = 4096
_GRANULE_BYTES = 2 << 20


class DeviceMemory:
    """One plain allocation. It is freed when neither this object nor a tensor over it is left.

    CUDA carves small allocations out of one piece of 2 MiB, and to export one exports them all: so it takes whole pieces.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        """Raises OutOfMemory."""
        self.size = size
        self.address = driver.allocate(-(-size // _GRANULE_BYTES) * _GRANULE_BYTES)
        self._driver = driver
        weakref.finalize(self, _free, driver, self.address).atexit = False

    def tensor(self) -> torch.Tensor:
        """uint8 [size]."""
        return self._driver.tensor(self.address, self.size, self)


class PinnedMemory:
    """Pinned host memory. To pin it costs a thousand times what using it again does, so what is given back is kept.

    Sizes are rounded up to powers of two; up to `max_spare_bytes` are kept for the next who asks.
    """

    def __init__(self, driver: Driver, *, max_spare_bytes: int = 1 << 28) -> None:
        self._driver = driver
        self._max_spare_bytes = max_spare_bytes
        self._spare_bytes = 0  # a hint: two threads may both think that theirs still fits
        self._spare: defaultdict[int, deque[int]] = defaultdict(deque)  # no lock: a finalizer may run in the middle of anything
        self._closed = False

    def take(self, size: int) -> HostBytes:
        """uint8 [size]. Given back when the last view of it has gone, which must not be before the device is done with it."""
        capacity = max(_MIN_PINNED_BYTES, 1 << max(0, size - 1).bit_length())
        try:
            address = self._spare[capacity].pop()
            self._spare_bytes -= capacity
        except IndexError:
            address = self._driver.allocate_host(capacity)
        owner = (ctypes.c_uint8 * capacity).from_address(address)
        weakref.finalize(owner, self._give_back, capacity, address).atexit = False
        return np.frombuffer(memoryview(owner), np.uint8)[:size]

    def close(self) -> None:
        """Free what is spare now, and what is given back later as it comes."""
        self._closed = True
        for addresses in list(self._spare.values()):
            while addresses:
                _free_host(self._driver, addresses.pop())
        self._spare_bytes = 0

    def _give_back(self, capacity: int, address: int) -> None:
        if self._closed or self._spare_bytes + capacity > self._max_spare_bytes:
            _free_host(self._driver, address)
        else:
            self._spare_bytes += capacity
            self._spare[capacity].append(address)


# Of a context that is lost nothing can be freed, nor need it be.


def _free(driver: Driver, address: int) -> None:
    with suppress(DeviceFailed):
        driver.free(address)


def _free_host(driver: Driver, address: int) -> None:
    with suppress(DeviceFailed):
        driver.free_host(address)
