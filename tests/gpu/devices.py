"""The backends that one suite of tests holds to the same: the CPU's, CUDA's over a driver without a device, and a GPU's."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu.backend import Backend, open_backend
from gpu.cuda.processes import ProcessId
from gpu.pool import Destination, Pool, PoolSpec
from tests.gpu.cuda.fake_driver import FakeDriver, FakeProcesses, fake_backend

Rows = npt.NDArray[np.uint8]  # [n, block_bytes]

DEVICES = ["cpu", "cuda, no device", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUT = 0xFEDCBA9876543210


class Device:
    """A backend, and another process's on the same device."""

    def __init__(self, backend: Backend, peer: Backend | None) -> None:
        self.backend = backend
        self.stream = backend.open_stream("test")
        self._peer = peer

    @property
    def peer(self) -> Backend:
        if self._peer is None:
            pytest.skip("another process on a GPU has tests of its own")
        return self._peer

    def pool(self, num_blocks: int = 6, block_bytes: int = 1024, *, seed: int = 1, of: Backend | None = None) -> Pool:
        """With random blocks."""
        pool = (of or self.backend).allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", LAYOUT))
        write(pool, np.random.default_rng(seed).integers(0, 256, (num_blocks, block_bytes), np.uint8))
        return pool

    def checksum(self, pool: Pool, block_ids: Sequence[int]) -> list[int]:
        return self.stream.submit(pool.checksum, block_ids).result(timeout=60)


@contextmanager
def open_device(name: str) -> Iterator[Device]:
    with ExitStack() as stack:
        if name == "cuda, no device":
            ended: set[ProcessId] = set()
            drivers = [FakeDriver(), FakeDriver()]
            backends = [
                fake_backend(driver, dtype=torch.float32, processes=FakeProcesses(ProcessId(pid, 1), ended=ended))
                for pid, driver in enumerate(drivers, 1)
            ]
            for driver in drivers:
                stack.callback(is_empty, driver)
            for backend in backends:
                stack.callback(backend.close)
            device = Device(*backends)
        else:
            opened = open_backend(name)
            stack.callback(opened.close)
            device = Device(opened, opened if name == "cpu" else None)
        yield device


def write(pool: Pool | Destination, rows: Rows) -> None:
    """All blocks of a pool or scratch."""
    blocks = pool.blocks  # type: ignore[union-attr]
    if isinstance(blocks, torch.Tensor):
        blocks.copy_(torch.from_numpy(rows))
        if blocks.is_cuda:
            torch.cuda.synchronize()
    else:
        blocks[:] = rows


def contents(pool: Pool | Destination) -> Rows:
    """All blocks of a pool or scratch, copied."""
    blocks = pool.blocks  # type: ignore[union-attr]
    return blocks.cpu().numpy().copy() if isinstance(blocks, torch.Tensor) else blocks.copy()


def is_empty(driver: FakeDriver) -> None:
    """Fails unless all that was made has been given back."""
    if driver.left():
        gc.collect()  # tracebacks of what was raised know the memory
    assert driver.left() == {}, driver.left()
