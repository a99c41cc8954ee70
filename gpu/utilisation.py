"""What this process and its accelerator use: CPU time, memory, and through NVML how busy the accelerator is.

Does not know: who asks, or how often. What nobody can tell (no accelerator, no NVML, or it refuses, as in a MIG slice) is
None: a worker without figures serves like one with.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """An accelerator as its driver sees it: of all processes that use it."""

    name: str
    utilisation: float | None = None  # share of the last sample period in which anything ran, 0 to 1
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float  # of all threads of this process, since its start
    rss_bytes: int
    device: DeviceUsage | None


class DeviceMeter(Protocol):
    def read(self) -> DeviceUsage: ...

    def close(self) -> None: ...


class Meter:
    """Reads take tens of microseconds, with an accelerator up to milliseconds: not on an event loop."""

    def __init__(self, device: DeviceMeter | None = None) -> None:
        self._device = device

    def read(self) -> Usage:
        num_pages = int(_STATM.read_text().split()[1])
        usage = self._device.read() if self._device is not None else None
        return Usage(time.process_time(), num_pages * os.sysconf("SC_PAGE_SIZE"), usage)

    def close(self) -> None:
        if self._device is not None:
            self._device.close()


def open_meter(device: str) -> Meter:
    """For "cpu", "cuda:N" (as this process numbers them) or an emulated device, which has nothing to be measured."""
    if not device.startswith("cuda"):
        return Meter()
    from gpu.cuda.nvml import open_device_meter

    return Meter(open_device_meter(device))
