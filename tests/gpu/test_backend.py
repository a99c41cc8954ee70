from __future__ import annotations

import pytest

from gpu.backend import open_backend
from gpu.cpu import CpuBackend
from gpu.errors import PoolClosed, StreamClosed, UnknownDevice
from gpu.pool import PoolSpec
from tests.gpu.processes import run_python


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnknownDevice, match="'tpu'"):
        open_backend("tpu")


def test_the_cpu_says_what_it_is() -> None:
    backend = open_backend()
    assert (backend.name, backend.torch_device) == ("cpu", "cpu")
    assert backend.memory_budget() > 0
    backend.close()


def test_close_closes_all_that_was_opened() -> None:
    backend = CpuBackend()
    stream = backend.open_stream("one")
    pool = backend.allocate_pool(PoolSpec(2, 100, "kv", 1))
    backend.close()
    backend.close()
    with pytest.raises(StreamClosed):
        stream.submit(int)
    with pytest.raises(PoolClosed):
        pool.block(0)


def test_it_stands_on_its_own() -> None:
    """A process that copies blocks needs neither torch nor an event loop, and nothing here knows the product above it."""
    loaded = run_python(
        "import sys, gpu.backend, gpu.cpu, gpu.kernels, gpu.team\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    assert not {"torch", "epd", "protocol", "cupy", "uvloop", "aiohttp", "tools", "tests"} & set(loaded)
