from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gpu.cuda.backend import CudaBackend
from gpu.cuda.handle import PAGE_BYTES
from gpu.cuda.pool import CudaPool
from gpu.cuda.reference import sum64_rows
from gpu.errors import BrokenPool, CannotMap, DeviceFailed, LayoutMismatch, OutOfMemory
from gpu.host_pool import HostPool
from gpu.pool import PoolSpec
from tests.gpu.cuda.fake_driver import FakeDriver, fake_backend
from tests.gpu.devices import contents, is_empty, write

MIB = 1 << 20


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(total_bytes=64 * MIB)


@pytest.fixture
def backend(driver: FakeDriver) -> Iterator[CudaBackend]:
    opened = fake_backend(driver)
    yield opened
    driver.release()
    opened.close()
    is_empty(driver)


def make_pool(backend: CudaBackend, num_blocks: int = 6, block_bytes: int = 1024) -> CudaPool:
    pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", 7))
    write(pool, np.random.default_rng(1).integers(0, 256, (num_blocks, block_bytes), np.uint8))
    return pool


def test_checksums_are_sum64(backend: CudaBackend) -> None:
    pool = make_pool(backend)
    found = backend.open_stream("test").submit(pool.checksum, [4, 0, 4]).result(timeout=60)
    assert found == [int(each) for each in sum64_rows(contents(pool)[[4, 0, 4]])]


def test_an_array_is_the_pool_itself(backend: CudaBackend) -> None:
    pool = make_pool(backend, 3, 2 * 8 * 2)
    array = pool.array(torch.bfloat16, (2, 8))
    assert array.shape == (3, 2, 8)
    array[1, 1, 7] = 1.5
    assert pool.blocks[1].view(torch.bfloat16)[15] == 1.5
    with pytest.raises(ValueError, match="take 18 bytes, and here they have 32"):
        pool.array(torch.bfloat16, (3, 3))


@pytest.mark.parametrize("block_bytes", [8, 24, 1000])
def test_blocks_that_the_kernels_cannot_move_are_refused(backend: CudaBackend, block_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        backend.allocate_pool(PoolSpec(2, block_bytes, "kv", 7))


def test_blocks_of_host_memory_are_refused(backend: CudaBackend) -> None:
    from gpu import copy

    host = HostPool(PoolSpec(6, 1024, "kv", 7), copy)
    with pytest.raises(LayoutMismatch, match="not in device memory"):
        make_pool(backend).copy_from(host, [0], [0], [0])
    host.close()


def test_too_large_a_pool_is_refused_with_the_numbers_and_takes_nothing(backend: CudaBackend, driver: FakeDriver) -> None:
    first = make_pool(backend, 32, MIB)
    with pytest.raises(OutOfMemory, match="use fewer blocks") as caught:
        backend.allocate_pool(PoolSpec(40, MIB, "kv", 7))
    assert caught.value.wanted_bytes == 42 * MIB  # in pieces of 2 MiB, the label's among them
    assert caught.value.available_bytes == 30 * MIB == backend.memory_budget()
    first.close()
    assert backend.memory_budget() == 64 * MIB
    backend.allocate_pool(PoolSpec(40, MIB, "kv", 7))


def test_the_memory_lives_as_long_as_a_tensor_over_it(backend: CudaBackend) -> None:
    pool = make_pool(backend)
    array = pool.array(torch.uint8, (1024,))
    expected = array.clone()
    pool.close()
    assert backend.memory_budget() == 62 * MIB
    assert torch.equal(array, expected)
    del array
    assert backend.memory_budget() == 64 * MIB


_LABEL_AT = 4 * PAGE_BYTES  # behind four pages of blocks, the last of which is not full


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (5 * 3072, "past the last block"),
        (_LABEL_AT, "the last page"),
        (_LABEL_AT + 39, "the last page"),
        (_LABEL_AT + 40, "past the last block"),
        (_LABEL_AT + PAGE_BYTES - 1, "past the last block"),
    ],
)
def test_a_write_past_the_blocks_is_noticed(backend: CudaBackend, driver: FakeDriver, at: int, what: str) -> None:
    pool = make_pool(backend, 5, 3072)
    pool.check_integrity()
    driver.bytes_at(pool.blocks.data_ptr() + at, 1)[0] ^= 1
    with pytest.raises(BrokenPool, match=what):
        pool.check_integrity()


def test_integrity_and_reading_do_not_wait_for_a_busy_stream(backend: CudaBackend, driver: FakeDriver) -> None:
    pool, stream = make_pool(backend), backend.open_stream("busy")
    driver.hold(stream.handle)
    pool.check_integrity()
    assert bytes(pool.read([3])[0]) == contents(pool)[3].tobytes()


def test_a_copy_resolves_when_the_device_is_done(backend: CudaBackend, driver: FakeDriver) -> None:
    src, dst, stream = make_pool(backend), make_pool(backend), backend.open_stream("copies")
    checksums = [int(each) for each in sum64_rows(contents(src))]
    write(dst, np.zeros((6, 1024), np.uint8))
    driver.hold(stream.handle)
    copied = stream.submit(dst.copy_from, src, [5], [0], [checksums[5]])
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 4)  # ids in, copy, sums out, event
    assert not copied.done()
    assert not contents(dst).any()
    driver.release()
    assert copied.result(timeout=60) == -1


def test_a_pool_closed_under_a_copy_stays_until_it_is_over(backend: CudaBackend, driver: FakeDriver) -> None:
    src, dst, stream = make_pool(backend), make_pool(backend), backend.open_stream("copies")
    checksum = int(sum64_rows(contents(src))[5])
    driver.hold(stream.handle)
    copied = stream.submit(dst.copy_from, src, [5], [0], [checksum])
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 4)
    src.close()
    dst.close()
    assert driver.left()["memory"] == 2
    driver.release()
    assert copied.result(timeout=60) == -1


def test_neighbouring_blocks_travel_together(backend: CudaBackend, driver: FakeDriver) -> None:
    pool = make_pool(backend, 64)
    before = driver.calls["copy_to_host"]
    pool.read([*range(10, 40), 3, 4, 50])
    assert driver.calls["copy_to_host"] - before == 3
    before = driver.calls["copy_to_device"]
    backend.open_stream("test").submit(pool.landing([*range(10, 40), 9]).settle, [0] * 31).result(timeout=60)
    assert driver.calls["copy_to_device"] - before == 2 + 1  # and the ids


class TestLanding:
    def test_what_a_socket_still_fills_is_given_to_nobody_else(self, backend: CudaBackend, driver: FakeDriver) -> None:
        buffers = make_pool(backend).landing([0, 1]).buffers  # a transfer that was given up, but for its socket
        other = make_pool(backend).landing([0, 1])
        other.buffers[0][:] = bytes(1024)
        buffers[0][:] = b"x" * 1024
        assert bytes(other.buffers[0]) == bytes(1024)

    def test_pinned_memory_is_used_again(self, backend: CudaBackend, driver: FakeDriver) -> None:
        pool, stream = make_pool(backend), backend.open_stream("test")
        stream.submit(pool.landing([0, 1]).settle, [0, 0]).result(timeout=60)
        made = len(driver.pinned_sizes)
        for _ in range(10):
            stream.submit(pool.landing([0, 1]).settle, [0, 0]).result(timeout=60)
        assert len(driver.pinned_sizes) <= made + 1

    def test_a_number_of_checksums_that_is_off_is_refused(self, backend: CudaBackend) -> None:
        with pytest.raises(ValueError, match="1 checksums for 2 blocks"):
            make_pool(backend).landing([0, 1]).settle([0])


def test_close_of_the_backend_waits_for_what_is_under_way(driver: FakeDriver) -> None:
    backend = fake_backend(driver)
    src, dst, stream = make_pool(backend), make_pool(backend), backend.open_stream("copies")
    checksum = int(sum64_rows(contents(src))[5])
    driver.hold(stream.handle)
    copied = stream.submit(dst.copy_from, src, [5], [0], [checksum])
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 4)
    closer = threading.Thread(target=backend.close)
    closer.start()
    driver.release()
    closer.join(timeout=60)
    assert copied.result(timeout=60) == -1
    del src, dst
    is_empty(driver)


def test_scratch_may_be_used_on_all_streams_that_are_open(backend: CudaBackend, driver: FakeDriver) -> None:
    streams = [backend.open_stream(name) for name in "ab"]
    backend.allocate_scratch(2, 64)
    assert driver.borrowed_for[-1] == tuple(stream.handle for stream in streams)


def test_a_device_that_failed_is_not_asked_any_more(driver: FakeDriver) -> None:
    backend = fake_backend(driver)
    pool = make_pool(backend)
    driver.fail()
    for use in (lambda: pool.read([0]), pool.check_integrity, backend.memory_budget):
        with pytest.raises(DeviceFailed):
            use()
    pool.close()


@pytest.mark.parametrize("what", ["create_event", "export_memory", "export_event"])
def test_a_pool_that_cannot_be_shared_serves_its_owner_and_says_why(
    what: str, backend: CudaBackend, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(driver, what)

    def refuse(*arguments: object, **options: object) -> object:
        if what == "create_event" and not options.get("interprocess"):
            return original(*arguments, **options)
        raise CannotMap("cudaErrorNotSupported: operation not supported")

    monkeypatch.setattr(driver, what, refuse)
    pool = make_pool(backend)
    export = pool.export()
    assert pool.export() == export
    with pytest.raises(CannotMap, match="keeps it to itself: cudaErrorNotSupported"):
        backend.map_pool(export)
    found = backend.open_stream("test").submit(pool.checksum, [4]).result(timeout=60)
    assert found == [int(each) for each in sum64_rows(contents(pool)[[4]])]
