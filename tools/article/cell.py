"""One topology under one workload, in figures. Pure: records and two descriptions of the cluster in, device times out.

Times are those of devices: what was measured, divided by the factor by which the devices were slowed down; rates are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from epd.trust import MAX_LATE_SHARE, MAX_LOOP_LAG_S
from tools.article.drive import Drive
from tools.article.workloads import Promise
from tools.loadgen.stats import ttft_s
from tools.loadgen.stream import FAILED, OK, Record

GOOD_SHARE = 0.9
_STEP = 1.2  # numbers of users within such a factor are judged together


@dataclass(frozen=True, slots=True)
class Cell:
    topology: str
    workload: str
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float
    itl_mean_s: float
    requests_per_s: float
    utilisation: float  # of all devices, mean
    sessions: float  # users at once within the promise
    is_open: bool  # no number of users that was tried broke it
    num_requests: int
    failures: int
    late_share: float
    doubts: list[str] = field(default_factory=list)


def cell(
    topology: str,
    workload: str,
    found: Drive,
    before: dict[str, Any],
    after: dict[str, Any],
    *,
    slow: float,
    promise: Promise,
    output_tokens: int,
) -> Cell:
    start, end = found.held_s
    first_tokens = [ttft_s(record) for record in found.records if _has_begun(record) and start <= record.piece_times_s[0] <= end]
    pieces = [np.asarray(record.piece_times_s) for record in found.records if len(record.piece_times_s) > 1]
    gaps = np.concatenate([np.diff(times)[(times[1:] >= start) & (times[1:] <= end)] for times in pieces] or [np.empty(0)])
    num_tokens = sum(_tokens_in(record, start, end) for record in found.records)
    busy, late = _devices(before, after)
    sessions, is_open = sessions_at(found, promise, slow)
    mean, p50, p99 = _mean_p50_p99(first_tokens)
    itl_mean, _, itl_p99 = _mean_p50_p99(gaps)
    return Cell(
        topology=topology,
        workload=workload,
        ttft_mean_s=mean / slow,
        ttft_p50_s=p50 / slow,
        ttft_p99_s=p99 / slow,
        itl_p99_s=itl_p99 / slow,
        itl_mean_s=itl_mean / slow,
        requests_per_s=num_tokens / output_tokens / (end - start) * slow,
        utilisation=busy / (end - start) / max(1, len(after["workers"])),
        sessions=sessions,
        is_open=is_open,
        num_requests=len(first_tokens),
        failures=sum(record.outcome == FAILED and record.reason != "unfinished" for record in found.records),
        late_share=late / busy if busy else 0.0,
        doubts=_doubts(found, after, late / busy if busy else 0.0),
    )


def sessions_at(found: Drive, promise: Promise, slow: float) -> tuple[float, bool]:
    """The highest number of users at which nine requests in ten kept the promise, and whether no number broke it."""
    joined = np.asarray(found.joined_s)
    end = found.held_s[1]
    judged: list[tuple[int, bool]] = []
    for record in found.records:
        verdict = _verdict(record, promise, slow, end)
        if verdict is not None:
            judged.append((int(np.searchsorted(joined, record.sent_s, side="right")), verdict))
    best, low = 0.0, 1.0
    most = len(joined)
    while low <= most:
        high = min(max(low * _STEP, low + 1), most + 1)
        good = [is_good for number, is_good in judged if low <= number < high]
        if good and sum(good) < GOOD_SHARE * len(good):
            return best, False
        if good:
            best = float(max(number for number, _ in judged if low <= number < high))
        low = high
    return best, True


def _verdict(record: Record, promise: Promise, slow: float, end: float) -> bool | None:
    """Whether a request kept the promise; None when it was cut off before that could be told."""
    if record.outcome == OK:
        return promise.holds(record, slow)
    if record.reason != "unfinished":
        return False
    if not record.piece_times_s:
        return False if end - record.sent_s > slow * promise.ttft_of(record.kind, record.num_images) else None
    if ttft_s(record) > slow * promise.ttft_of(record.kind, record.num_images):
        return False
    return None


def _has_begun(record: Record) -> bool:
    return len(record.piece_times_s) > 0 and (record.outcome == OK or record.reason == "unfinished")


def _tokens_in(record: Record, start: float, end: float) -> float:
    """Tokens that came in the stretch; a piece may have several."""
    if not _has_begun(record):
        return 0.0
    times = np.asarray(record.piece_times_s)
    num_pieces = int(((times >= start) & (times <= end)).sum())
    return num_pieces * (record.output_tokens / len(times) if record.outcome == OK else 1.0)


def _devices(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    """Seconds that the devices were busy, and late, between two descriptions."""
    then = {worker["worker"]: worker["process"] for worker in before["workers"]}
    busy = late = 0.0
    for worker in after["workers"]:
        now, earlier = worker["process"], then.get(worker["worker"])
        if now is not None and earlier is not None:
            busy += now["device_busy_s"] - earlier["device_busy_s"]
            late += now["device_late_s"] - earlier["device_late_s"]
    return busy, late


def _doubts(found: Drive, after: dict[str, Any], late_share: float) -> list[str]:
    doubts = []
    if late_share > MAX_LATE_SHARE:
        doubts.append(f"devices' work ended late by {100 * late_share:.1f} % of its time")
    lags = {"load generator": float(np.percentile(found.lags_s, 99)) if found.lags_s else 0.0, "gateway": after["loop_lag_s"]}
    worker_lags = [worker["process"]["loop_lag_s"] for worker in after["workers"] if worker["process"]]
    lags["slowest worker"] = max(worker_lags, default=0.0)
    doubts += [f"{name}: event loop late by {1e3 * lag:.0f} ms (p99)" for name, lag in lags.items() if lag > MAX_LOOP_LAG_S]
    return doubts


def _mean_p50_p99(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float, float]:
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    p50, p99 = np.percentile(values, (50, 99))
    return float(np.mean(values)), float(p50), float(p99)
