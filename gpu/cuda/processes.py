"""Who is who on this host, and who still lives: processes by their number and the time of their start, so that no other is meant.

A host is known by its boot id. Processes of another container have numbers of their own: they look as if they were not there.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    started: int  # clock ticks since boot


class Processes(Protocol):
    @property
    def boot_id(self) -> bytes:
        """16 bytes that no other host has, nor this one after it was started again."""

    @property
    def own(self) -> ProcessId: ...

    def is_alive(self, process: ProcessId) -> bool: ...


class HostProcesses:
    """As /proc tells."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.boot_id = uuid.UUID((proc / "sys/kernel/random/boot_id").read_text().strip()).bytes
        self.own = ProcessId(os.getpid(), _start_of(proc / str(os.getpid())) or 0)

    def is_alive(self, process: ProcessId) -> bool:
        """False for one that has been killed and that its parent has not looked at yet, too."""
        return _start_of(self._proc / str(process.pid)) == process.started


def _start_of(folder: Path) -> int | None:
    """When a process was started, in clock ticks. None: it has ended."""
    try:
        stat = (folder / "stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
