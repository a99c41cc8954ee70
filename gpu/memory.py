"""Memory that another process can map and that nobody has to delete: a sealed memfd.

Owns the system calls (memfd_create, mmap, madvise, seals) and knows nothing of blocks. A memfd has no name, so it ends with the
last process that holds it, however that process ends. It is sealed against shrinking, so that whoever has mapped it cannot be hit
by SIGBUS.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpu.errors import CannotMap

Bytes = npt.NDArray[np.uint8]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module
_EAGER_BYTES = 16 << 20
_TOUCH_STEP_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SharedMemory:
    """`size` bytes, zeroed, writable here and readable by whoever maps `fd`.

    Touching a page for the first time costs several times what copying it costs, and touching all of a large pool costs seconds.
    So small memory is touched at once and the rest by a thread of the lowest priority, lowest address first, ahead of its use and
    beside the start of everything else. Whoever comes first to a page, thread or user, finds it zeroed: the order does not
    matter.
    """

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.inode = os.fstat(self.fd).st_ino
            self.bytes = _map(self.fd, size, writable=True)
        except BaseException:
            os.close(self.fd)
            raise
        self._stop_touching = threading.Event()
        _touch(self.bytes[:_EAGER_BYTES])
        if size > _EAGER_BYTES:
            arguments = (self.bytes[_EAGER_BYTES:], self._stop_touching)
            threading.Thread(target=_touch_all, args=arguments, name=f"touch-{name}", daemon=True).start()

    def close(self) -> None:
        """Give up the descriptor. The pages go when the last array over them has gone, here and in other processes."""
        if self.fd < 0:
            return
        self._stop_touching.set()  # not waited for: of so low a priority it may take long to hear
        os.close(self.fd)
        self.fd = -1
        self.bytes = self.bytes[:0].copy()


def map_shared(pid: int, fd: int, inode: int, size: int) -> Bytes:
    """The memory behind descriptor `fd` of process `pid`, read-only.

    Raises CannotMap unless it is `size` bytes at `inode`, sealed.
    """
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotMap(f"cannot open descriptor {fd} of process {pid}: {error.strerror}") from error
    try:
        found = os.fstat(own)
        if found.st_ino != inode or found.st_size != size:
            raise CannotMap(
                f"descriptor {fd} of process {pid} is {found.st_size} bytes at inode {found.st_ino}, not {size} at {inode}: "
                "that process has ended or is on another host"
            )
        if fcntl.fcntl(own, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == 0:
            raise CannotMap(f"descriptor {fd} of process {pid} is not sealed against shrinking")
        return _map(own, size, writable=False)
    except OSError as error:
        raise CannotMap(f"cannot map descriptor {fd} of process {pid}: {error.strerror}") from error
    finally:
        os.close(own)


def available_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can still be taken without swapping: the least of what the machine and our control groups have left."""
    available = _numbers(proc / "meminfo")["MemAvailable"] * 1024
    for line in (proc / "self/cgroup").read_text().splitlines():
        if line.startswith("0::"):  # version 2, the only one that has limits for all memory in one place
            group = cgroups / line[3:].lstrip("/")
            for each in [group, *group.parents]:
                if each.is_relative_to(cgroups):
                    available = min(available, _left_in_group(each, available))
    return max(0, available)


def _left_in_group(group: Path, otherwise: int) -> int:
    """A control group's limit less its use; the page cache counts as its use and can be taken back."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return otherwise
        use = int((group / "memory.current").read_text())
        stat = _numbers(group / "memory.stat")
        return int(limit) - use + stat["inactive_file"] + stat["active_file"]
    except OSError:  # the root group has no such files, and a container may not show them
        return otherwise


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    rows = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _map(fd: int, size: int, *, writable: bool) -> Bytes:
    """All of `fd`, page-aligned, in huge pages where the kernel gives them for shared memory (`shmem_enabled`)."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        pass
    return np.frombuffer(mapping, dtype=np.uint8)


def _touch_all(memory: Bytes, stop: threading.Event) -> None:
    """In steps so long that this thread, which may be kept waiting at any point, seldom holds the interpreter's lock."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    for start in range(0, len(memory), _TOUCH_STEP_BYTES):
        if stop.is_set() or not _touch(memory[start : start + _TOUCH_STEP_BYTES]):
            return


def _touch(memory: Bytes) -> bool:
    """Have the pages made. A kernel too old for it says no, and pages are then made on first use."""
    return bool(_libc.madvise(memory.ctypes.data, len(memory), _MADV_POPULATE_WRITE) == 0)
