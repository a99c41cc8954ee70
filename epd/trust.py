"""Whether figures of emulated devices may be believed: a host that is too slow would pass for a slow device. Pure.

A run is doubtful when an emulated device ended its work later than its profile says by more than 2 % of the time that the work
took, when an event loop was late by more than 20 ms for one wake-up in a hundred, or when more than 95 % of the host's processor
time was in use.
"""

from __future__ import annotations

from protocol.messages import ProcessLoad

MAX_LATE_SHARE = 0.02
MAX_LOOP_LAG_S = 0.020
MAX_HOST_SHARE = 0.95
_LEAST_BUSY_S = 1.0  # before that, a share says nothing


def since(before: ProcessLoad | None, now: ProcessLoad) -> tuple[float, float]:
    """(busy_s, late_s) of an emulated device between two reports, or since the start; (0, 0) of any other."""
    if now.device_busy_s < 0:
        return 0.0, 0.0
    busy, late = (before.device_busy_s, before.device_late_s) if before is not None else (0.0, 0.0)
    return now.device_busy_s - busy, now.device_late_s - late


def doubts(name: str, process: ProcessLoad, before: ProcessLoad | None = None) -> list[str]:
    """Why not to believe what an emulated device did since `before`; empty: nothing speaks against it."""
    if process.device_busy_s < 0:
        return []
    busy_s, late_s = since(before, process)
    found = []
    if busy_s >= _LEAST_BUSY_S and late_s > MAX_LATE_SHARE * busy_s:
        found.append(f"{name}: work ended late by {100 * late_s / busy_s:.1f} % of its time")
    found += lag_doubts(name, process.loop_lag_s)
    if process.host_busy > MAX_HOST_SHARE:
        found.append(f"{name}: {100 * process.host_busy:.0f} % of its host's processor time is in use")
    return found


def lag_doubts(name: str, loop_lag_s: float) -> list[str]:
    return [f"{name}: event loop late by {1e3 * loop_lag_s:.0f} ms (p99)"] if loop_lag_s > MAX_LOOP_LAG_S else []
