"""Real processes for tests of memory that is shared between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

import gpu
from gpu.pool import PoolExport

ROOT = Path(str(gpu.__file__)).parent.parent

_EXPORTER = """
import json, msgspec, sys
from gpu.backend import open_backend
from gpu.pool import PoolSpec
num_blocks, block_bytes, layout = map(int, sys.argv[1:])
backend = open_backend()
pool = backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", layout))
for i in range(num_blocks):
    pool.blocks[i] = i + 1
checksums = pool.checksum(range(num_blocks))
print(json.dumps({"export": msgspec.to_builtins(pool.export()), "checksums": checksums}), flush=True)
sys.stdin.readline()
backend.close()
print("closed", flush=True)
sys.stdin.readline()
"""


class Exporter:
    """A process with a pool of which block i is filled with i + 1."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        told = json.loads(self._read())
        self.export = msgspec.convert(told["export"], PoolExport)
        self.checksums: list[int] = told["checksums"]

    def close_pool(self) -> None:
        self._tell()
        assert self._read() == "closed\n"

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self._process.pid, signal.SIGKILL)
        assert self._process.wait() == -signal.SIGKILL

    def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def exporter(num_blocks: int, block_bytes: int, layout: int) -> Iterator[Exporter]:
    arguments = [str(number) for number in (num_blocks, block_bytes, layout)]
    with subprocess.Popen(
        [sys.executable, "-c", _EXPORTER, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Exporter(process)
        finally:
            process.kill()


def run_python(script: str, *arguments: str, environment: dict[str, str] | None = None, root: Path = ROOT) -> str:
    """What a script prints, run in a process of its own in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=root,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def holders(inode: int) -> set[int]:
    """The processes that have a memfd of ours with this inode open or mapped."""
    return {int(process.name) for process in Path("/proc").glob("[0-9]*") if _maps(process, inode) or _opens(process, inode)}


def _maps(process: Path, inode: int) -> bool:
    try:
        lines = (process / "maps").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return False
    return any("/memfd:epd-" in line and line.split()[4] == str(inode) for line in lines)


def _opens(process: Path, inode: int) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor).startswith("/memfd:epd-") and os.stat(descriptor).st_ino == inode:
                return True
        except OSError:  # closed meanwhile
            continue
    return False
