"""How long work takes on the device: between its own events. The host's clock stands in only where there is no device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

_ROUNDS = 9
_WARM_UPS = 3


class Timer(Protocol):
    def median_s(self, work: Callable[[], object], *, rounds: int = _ROUNDS, warm_ups: int = _WARM_UPS) -> float:
        """The median time of `work` on the device, once it has been run `warm_ups` times."""

    def synchronize(self) -> None:
        """Block until the device has done everything."""


class CudaTimer:
    """Work is launched round after round without a wait, each between two events of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def median_s(self, work: Callable[[], object], *, rounds: int = _ROUNDS, warm_ups: int = _WARM_UPS) -> float:
        for _ in range(warm_ups):
            work()
        self.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for before, after in events:
            before.record()
            work()
            after.record()
        self.synchronize()
        return statistics.median(float(before.elapsed_time(after)) for before, after in events) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


class HostTimer:
    """For a driver without a device, on which work is done when its call returns."""

    def median_s(self, work: Callable[[], object], *, rounds: int = _ROUNDS, warm_ups: int = _WARM_UPS) -> float:
        return median_wall_s(work, rounds=rounds, warm_ups=warm_ups)

    def synchronize(self) -> None:
        """Nothing is ever under way."""


def open_timer(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


def median_wall_s(work: Callable[[], object], *, rounds: int = _ROUNDS, warm_ups: int = _WARM_UPS) -> float:
    """The median time that a caller waits for `work`, which returns when it is done."""
    for _ in range(warm_ups):
        work()
    durations = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)
