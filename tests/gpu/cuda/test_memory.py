from __future__ import annotations

import gc
import threading

import pytest

from gpu.cuda.memory import DeviceMemory, PinnedMemory
from gpu.errors import OutOfMemory
from tests.gpu.cuda.fake_driver import FakeDriver


@pytest.fixture
def driver() -> FakeDriver:
    driver = FakeDriver(total_bytes=1 << 25)
    driver.use()
    return driver


class TestPinnedMemory:
    @pytest.mark.parametrize(("size", "pinned"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)])
    def test_it_is_as_large_as_asked_and_comes_in_powers_of_two(self, driver: FakeDriver, size: int, pinned: int) -> None:
        memory = PinnedMemory(driver)
        taken = memory.take(size)
        assert (taken.nbytes, str(taken.dtype), taken.flags.writeable) == (size, "uint8", True)
        del taken
        memory.close()
        assert driver.pinned_sizes == [pinned]
        assert driver.left() == {}

    def test_what_is_looked_at_is_not_given_to_another(self, driver: FakeDriver) -> None:
        memory = PinnedMemory(driver)
        view = memory.take(100).data[10:20]
        view[:] = b"x" * 10
        other = memory.take(100)
        other[:] = 0
        assert bytes(view) == b"x" * 10
        assert len(driver.pinned_sizes) == 2

    def test_what_nobody_looks_at_is_used_again(self, driver: FakeDriver) -> None:
        memory = PinnedMemory(driver)
        for _ in range(10):
            memory.take(100)[:] = 1
        assert len(driver.pinned_sizes) == 1
        memory.take(5000)
        assert len(driver.pinned_sizes) == 2

    def test_only_so_much_is_kept(self, driver: FakeDriver) -> None:
        memory = PinnedMemory(driver, max_spare_bytes=8192)
        taken = [memory.take(4096) for _ in range(4)]
        del taken
        assert driver.left() == {"pinned": 2}

    def test_what_comes_back_after_close_is_freed(self, driver: FakeDriver) -> None:
        memory = PinnedMemory(driver)
        taken = memory.take(10)
        memory.take(10)
        memory.close()
        assert driver.left() == {"pinned": 1}
        del taken
        assert driver.left() == {}

    def test_threads_share_it(self, driver: FakeDriver) -> None:
        memory = PinnedMemory(driver)
        wrong: list[int] = []

        def use(mark: int) -> None:
            for _ in range(200):
                mine = memory.take(64)
                mine[:] = mark
                if (mine != mark).any():
                    wrong.append(mark)

        threads = [threading.Thread(target=use, args=(mark,)) for mark in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        memory.close()
        assert driver.left() == {}


class TestDeviceMemory:
    def test_it_goes_with_the_last_who_sees_it(self, driver: FakeDriver) -> None:
        memory = DeviceMemory(driver, 100)
        tensor = memory.tensor()
        part = tensor[50:]
        assert tensor.shape == (100,)
        del memory, tensor
        gc.collect()
        assert driver.left() == {"memory": 1}
        del part
        assert driver.left() == {}

    def test_it_takes_whole_pieces_of_what_cuda_exports(self, driver: FakeDriver) -> None:
        memory = DeviceMemory(driver, (2 << 20) + 1)
        assert driver.free_bytes() == (1 << 25) - (4 << 20)
        del memory
        with pytest.raises(OutOfMemory):
            DeviceMemory(driver, 1 << 26)
