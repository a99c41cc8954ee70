"""What this process and its accelerator use: CPU time, memory, and through NVML how busy the accelerator is.

Does not know: who asks, or how often. What nobody can tell (no accelerator, no NVML, or it refuses, as in a MIG slice) is
None: a worker without figures serves like one with.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

_STATM, _STAT = Path("/proc/self/statm"), Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """An accelerator as its driver sees it: of all processes that use it."""

    name: str
    utilisation: float | None = None  # share of the last sample period in which anything ran, 0 to 1
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None
    busy_s: float | None = None  # of an emulated device: time that work has taken, since its start
    late_s: float | None = None  # and by how much work ended too late


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float  # of all threads of this process, since its start
    rss_bytes: int
    device: DeviceUsage | None
    host_busy: float | None = None  # share of the host's processor time in use since the last reading


class DeviceMeter(Protocol):
    def read(self) -> DeviceUsage: ...

    def close(self) -> None: ...


class Meter:
    """Reads take tens of microseconds, with an accelerator up to milliseconds: not on an event loop."""

    def __init__(self, device: DeviceMeter | None = None) -> None:
        self._device = device
        self._host = _HostTimes.read()

    def read(self) -> Usage:
        num_pages = int(_STATM.read_text().split()[1])
        usage = self._device.read() if self._device is not None else None
        before, self._host = self._host, _HostTimes.read()
        busy = self._host.busy_since(before)
        return Usage(time.process_time(), num_pages * os.sysconf("SC_PAGE_SIZE"), usage, busy)

    def close(self) -> None:
        if self._device is not None:
            self._device.close()


class _HostTimes(NamedTuple):
    """Of all processors together, in ticks since boot."""

    total: int
    idle: int

    @classmethod
    def read(cls) -> _HostTimes:
        try:
            ticks = [int(word) for word in _STAT.read_text().partition("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return cls(0, 0)  # nobody can tell
        return cls(sum(ticks), sum(ticks[3:5]))  # idle, and waiting for a disk

    def busy_since(self, before: _HostTimes) -> float | None:
        total = self.total - before.total
        return 1.0 - (self.idle - before.idle) / total if total > 0 else None


def open_meter(device: str) -> Meter:
    """For "cpu" or "cuda:N" (as this process numbers them); an emulated device tells of itself."""
    if not device.startswith("cuda"):
        return Meter()
    from gpu.cuda.nvml import open_device_meter

    return Meter(open_device_meter(device))
