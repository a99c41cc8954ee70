from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.cuda.handle import Handle, label, memory_size
from gpu.cuda.processes import HostProcesses, ProcessId
from gpu.errors import CannotMap


def stat(proc: Path, pid: int, name: str, state: str, started: int) -> None:
    (proc / str(pid)).mkdir(parents=True, exist_ok=True)
    fields = [state, *["0"] * 18, str(started), *["0"] * 30]
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")


class TestHostProcesses:
    @pytest.fixture
    def processes(self, tmp_path: Path) -> HostProcesses:
        (tmp_path / "sys/kernel/random").mkdir(parents=True)
        (tmp_path / "sys/kernel/random/boot_id").write_text("0f0e0d0c-0b0a-0908-0706-050403020100\n")
        stat(tmp_path, os.getpid(), "python", "R", 777)
        return HostProcesses(tmp_path)

    def test_it_knows_itself(self, processes: HostProcesses) -> None:
        assert processes.own == ProcessId(os.getpid(), 777)
        assert processes.is_alive(processes.own)
        assert processes.boot_id == bytes(range(15, -1, -1))

    @pytest.mark.parametrize("name", ["python", "a ) b (", "Z"])
    def test_whatever_it_is_called(self, processes: HostProcesses, tmp_path: Path, name: str) -> None:
        stat(tmp_path, 50, name, "S", 10)
        assert processes.is_alive(ProcessId(50, 10))

    def test_a_number_that_was_used_again_is_somebody_else(self, processes: HostProcesses, tmp_path: Path) -> None:
        stat(tmp_path, 50, "python", "S", 11)
        assert not processes.is_alive(ProcessId(50, 10))

    @pytest.mark.parametrize("state", ["Z", "X"])
    def test_one_that_was_killed_and_not_yet_buried_is_dead(self, processes: HostProcesses, tmp_path: Path, state: str) -> None:
        stat(tmp_path, 50, "python", state, 10)
        assert not processes.is_alive(ProcessId(50, 10))

    def test_one_that_is_not_there_is_dead(self, processes: HostProcesses) -> None:
        assert not processes.is_alive(ProcessId(51, 10))

    def test_this_host_s(self) -> None:
        processes = HostProcesses()
        assert processes.is_alive(processes.own)
        assert len(processes.boot_id) == 16
        code = "from gpu.cuda.processes import HostProcesses; print(HostProcesses().own.started, flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            known = ProcessId(other.pid, int(other.stdout.readline()))
            assert processes.is_alive(known)
            os.kill(other.pid, signal.SIGKILL)
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked
            assert not processes.is_alive(known)


class TestHandle:
    HANDLE = Handle(b"b" * 16, b"d" * 16, ProcessId(4_000_000, 2**63), 2**40, bytes(range(64)), bytes(range(64, 128)))

    def test_it_comes_back_as_it_was(self) -> None:
        assert Handle.unpack(self.HANDLE.pack()) == self.HANDLE

    @pytest.mark.parametrize("change", [lambda packed: packed[:-1], lambda packed: packed + b"x", lambda packed: b""])
    def test_what_is_none_is_refused(self, change: object) -> None:
        with pytest.raises(CannotMap, match="no handle"):
            Handle.unpack(change(self.HANDLE.pack()))  # type: ignore[operator]

    def test_labels_differ_in_all_that_a_pool_is(self) -> None:
        labels = {label(1, 2, 3, 4), label(9, 2, 3, 4), label(1, 9, 3, 4), label(1, 2, 9, 4), label(1, 2, 3, 9)}
        assert len(labels) == 5
        assert {len(each) for each in labels} == {40}

    @pytest.mark.parametrize(
        ("num_blocks", "block_bytes", "size"), [(1, 16, 8192), (1, 4096, 8192), (3, 4096, 16384), (1, 4112, 12288)]
    )
    def test_behind_whole_pages_of_blocks_comes_one_more(self, num_blocks: int, block_bytes: int, size: int) -> None:
        assert memory_size(num_blocks, block_bytes) == size
