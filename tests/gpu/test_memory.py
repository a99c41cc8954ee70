from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu.errors import CannotMap
from gpu.memory import SharedMemory, available_bytes, map_shared

WAIT_S = 20.0


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory("epd-test", 3 * 4096)
    yield made
    made.close()


def test_memory_is_zeroed_and_has_its_size(memory: SharedMemory) -> None:
    assert memory.bytes.shape == (3 * 4096,)
    assert not memory.bytes.any()
    assert os.fstat(memory.fd).st_size == 3 * 4096


@pytest.mark.parametrize("size", [4096, 40 << 20])
def test_every_page_comes_to_be_there_unasked(size: int) -> None:
    memory = SharedMemory("epd-test", size)
    deadline = time.monotonic() + WAIT_S
    while os.fstat(memory.fd).st_blocks * 512 < size:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    memory.close()


def test_closing_does_not_wait_for_large_memory_to_be_touched() -> None:
    memory = SharedMemory("epd-test", 8 << 30)
    fd = os.dup(memory.fd)
    memory.close()
    assert os.fstat(fd).st_blocks * 512 < 8 << 30
    os.close(fd)


def test_nobody_can_make_it_smaller_or_larger(memory: SharedMemory) -> None:
    for size in (0, 2 * 4096, 4 * 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_the_descriptor_does_not_outlive_close_and_is_not_inherited(memory: SharedMemory) -> None:
    assert not os.get_inheritable(memory.fd)
    fd = memory.fd
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_views_outlive_close(memory: SharedMemory) -> None:
    view = memory.bytes[:8]
    view[:] = 7
    memory.close()
    assert view.tolist() == [7] * 8


def test_a_mapping_sees_what_is_written_and_cannot_write(memory: SharedMemory) -> None:
    mapped = map_shared(os.getpid(), memory.fd, memory.inode, memory.size)
    memory.bytes[5] = 9
    assert mapped[5] == 9
    assert not mapped.flags.writeable
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        mapped.flags.writeable = True


def test_other_memory_is_not_mapped(memory: SharedMemory) -> None:
    with pytest.raises(CannotMap, match="not 12288 at"):
        map_shared(os.getpid(), memory.fd, memory.inode + 1, memory.size)
    with pytest.raises(CannotMap, match="not 8192 at"):
        map_shared(os.getpid(), memory.fd, memory.inode, 2 * 4096)


def test_a_descriptor_or_a_process_that_is_not_there_is_not_mapped(memory: SharedMemory) -> None:
    fd, inode = memory.fd, memory.inode
    memory.close()
    with pytest.raises(CannotMap, match="cannot open"):
        map_shared(os.getpid(), fd, inode, memory.size)
    with pytest.raises(CannotMap, match="cannot open"):
        map_shared(2**22 + 1, 3, inode, memory.size)


def test_memory_that_could_shrink_under_its_reader_is_not_mapped() -> None:
    fd = os.memfd_create("epd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(CannotMap, match="not sealed"):
        map_shared(os.getpid(), fd, os.fstat(fd).st_ino, 4096)
    os.close(fd)


def test_an_ordinary_file_is_not_mapped() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        with pytest.raises(CannotMap):
            map_shared(os.getpid(), file.fileno(), os.fstat(file.fileno()).st_ino, 4096)


def test_available_bytes_is_what_this_machine_has() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class TestControlGroups:
    """available_bytes over files that say what a machine of ours does not."""

    @pytest.fixture
    def host(self, tmp_path: Path) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\nHugePages_Total: 0\n")
        (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/outer/inner\n")
        (tmp_path / "cgroups/outer/inner").mkdir(parents=True)
        return tmp_path

    def available(self, host: Path) -> int:
        return available_bytes(proc=host / "proc", cgroups=host / "cgroups")

    def limit(self, group: Path, limit: str, current: int, cache: int) -> None:
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{current}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 0\n")

    def test_no_limit(self, host: Path) -> None:
        assert self.available(host) == 8000 * 1024

    def test_unlimited_group(self, host: Path) -> None:
        self.limit(host / "cgroups/outer/inner", "max", 5, 0)
        assert self.available(host) == 8000 * 1024

    def test_own_limit_less_use_page_cache_not_counted(self, host: Path) -> None:
        self.limit(host / "cgroups/outer/inner", "3000", 2500, 1000)
        assert self.available(host) == 3000 - 2500 + 1000

    def test_the_outer_group_s_limit_counts_too(self, host: Path) -> None:
        self.limit(host / "cgroups/outer/inner", "3000", 1000, 0)
        self.limit(host / "cgroups/outer", "2000", 1500, 0)
        assert self.available(host) == 500

    def test_never_below_nothing(self, host: Path) -> None:
        self.limit(host / "cgroups/outer", "2000", 2500, 0)
        assert self.available(host) == 0
