"""What is said where there is no device, with as much of CuPy as is then asked; and the driver on a device."""

from __future__ import annotations

import itertools
import sys
import types
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpu.backend import open_backend
from gpu.cuda import cupy_driver
from gpu.cuda.backend import CudaBackend
from gpu.cuda.cupy_driver import CupyDriver
from gpu.errors import CannotMap, OutOfMemory, UnknownDevice


class FakeRuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
        self.status = status


def install(monkeypatch: pytest.MonkeyPatch, *, driver: int = 13000, count: Callable[[], int] = lambda: 1) -> None:
    """A CuPy that answers what is asked before anything is made, and nothing else."""
    cupy = types.ModuleType("cupy")
    runtime = types.SimpleNamespace(CUDARuntimeError=FakeRuntimeError, driverGetVersion=lambda: driver, getDeviceCount=count)
    cupy.cuda = types.SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)


class TestNoDevice:
    def test_cupy_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(UnknownDevice, match=r"no CUDA device: .* install epd\[cuda12\] or epd\[cuda13\]"):
            CupyDriver(0)

    def test_the_driver_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, driver=0)
        with pytest.raises(UnknownDevice, match="no CUDA device: there is no NVIDIA driver"):
            CupyDriver(0)

    def test_the_driver_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> int:
            raise FakeRuntimeError(35)

        install(monkeypatch, count=fail)
        with pytest.raises(UnknownDevice, match="no CUDA device: cudaErrorInsufficientDriver"):
            CupyDriver(0)

    def test_there_are_fewer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch)
        with pytest.raises(UnknownDevice, match="no CUDA device 1: there are 1, numbered from 0"):
            CupyDriver(1)

    def test_torch_is_another_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch)
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(UnknownDevice, match="is built without CUDA"):
            CupyDriver(0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UnknownDevice, match=r"for CUDA 13\.0 does not find one"):
            CupyDriver(0)

    @pytest.mark.parametrize("device", ["cuda", "cuda:3"])
    def test_as_the_command_line_names_it(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        install(monkeypatch, driver=0)
        with pytest.raises(UnknownDevice, match="no CUDA device"):
            open_backend(device)


def test_a_stream_that_is_done_with_is_kept_for_the_next_of_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may still mark it: memory that it used may be let go later."""
    numbers = itertools.count(100)
    runtime = types.SimpleNamespace(streamNonBlocking=1, streamCreateWithPriority=lambda flags, priority: next(numbers))
    monkeypatch.setattr(cupy_driver, "_idle_streams", defaultdict(list))
    drivers = []
    for index in (0, 0, 1):
        driver = object.__new__(CupyDriver)
        driver._runtime, driver._error, driver._index, driver._priority_of = runtime, FakeRuntimeError, index, {}
        drivers.append(driver)
    first, second, other = drivers
    low, high = first.create_stream(0), first.create_stream(-5)
    assert (low, high) == (100, 101)
    first.destroy_stream(low)
    assert second.create_stream(-5) == 102
    assert other.create_stream(0) == 103  # another device's
    assert second.create_stream(0) == low
    assert second.create_stream(0) == 104


@pytest.mark.gpu
class TestOnADevice:
    def test_it_says_what_it_is(self, cuda_backend: CudaBackend) -> None:
        info = cuda_backend.driver.info
        assert info.name.startswith("NVIDIA")
        assert len(info.uuid) == 16
        assert info.capability >= (7, 0)
        assert cuda_backend.driver.can_access(info.uuid) is True
        assert cuda_backend.driver.can_access(b"not a device 000") is None
        assert 0 < cuda_backend.memory_budget() <= info.total_bytes

    def test_decode_goes_before_prefill(self, cuda_backend: CudaBackend) -> None:
        least, greatest = cuda_backend.driver.priorities()
        assert greatest < least == 0

    def test_memory_is_one_for_torch_and_for_the_driver(self, cuda_backend: CudaBackend) -> None:
        driver = cuda_backend.driver
        address, host = driver.allocate(1 << 21), np.zeros(16, np.uint8)
        tensor = driver.tensor(address, 1 << 21, None)
        assert (tensor.data_ptr(), tensor.dtype, str(tensor.device)) == (address, torch.uint8, cuda_backend.torch_device)
        stream = driver.create_stream(0)
        driver.fill(address, 7, 1 << 21, stream)
        driver.synchronize(stream)
        assert bool((tensor == 7).all())
        tensor[3] = 9
        torch.cuda.synchronize()
        driver.copy_to_host(host, address, stream)
        driver.synchronize(stream)
        assert host[:5].tolist() == [7, 7, 7, 9, 7]
        driver.destroy_stream(stream)
        del tensor
        driver.free(address)

    def test_calls_of_a_stream_have_it_as_torch_s(self, cuda_backend: CudaBackend) -> None:
        stream = cuda_backend.open_stream("test")
        found = stream.submit(lambda: torch.cuda.current_stream().cuda_stream).result(timeout=60)
        assert found == stream.handle
        assert stream.submit(cuda_backend.driver.current_stream).result(timeout=60) == stream.handle

    def test_a_stream_runs_ahead_of_the_device(self, cuda_backend: CudaBackend) -> None:
        stream = cuda_backend.open_stream("test")
        order: list[str] = []

        def long(name: str) -> None:
            torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
            order.append(name)

        first, second = stream.submit(long, "a"), stream.submit(long, "b")
        launched = stream.submit(lambda: list(order))
        first.add_done_callback(lambda _: order.append("a is done"))
        second.result(timeout=60)
        assert launched.result(timeout=60) == ["a", "b"]

    def test_more_than_there_is_is_refused_with_the_numbers(self, cuda_backend: CudaBackend) -> None:
        with pytest.raises(OutOfMemory) as caught:
            cuda_backend.driver.allocate(1 << 45)
        assert caught.value.wanted_bytes == 1 << 45
        assert 0 < caught.value.available_bytes < 1 << 45
        with pytest.raises(OutOfMemory):
            cuda_backend.driver.borrow(1 << 45)
        assert cuda_backend.open_stream("after").submit(int, "3").result(timeout=60) == 3

    def test_a_handle_that_is_none_is_refused_and_harms_nothing(self, cuda_backend: CudaBackend) -> None:
        for use in (cuda_backend.driver.open_memory, cuda_backend.driver.open_event):
            with pytest.raises(CannotMap):
                use(bytes(64))
        assert cuda_backend.open_stream("after").submit(int, "3").result(timeout=60) == 3
