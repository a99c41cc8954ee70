"""From records to figures. Pure.

TTFT: first piece of output - due time. ITL: gap between two pieces of output (sending several tokens at once means fewer and
longer gaps). E2E: end of the stream - due time. TPOT: (E2E - TTFT) / (output tokens - 1), for answers of at least two tokens.
Latencies are those of the successful requests that were *due* in the window; throughput is what *arrived* in it, of successful
requests. Refusals and failures are counted by reason. Goodput is the requests that were due in the window and kept the SLO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tools.loadgen.load import Run
from tools.loadgen.stream import FAILED, OK, REFUSED, Record

# Beyond these the generator's own lateness shows in what it measures.
MAX_LAG_S = 0.01
MAX_CPU_SHARE = 0.9
_LAG_SHARE = 0.05  # of the median TTFT that may be the generator's own

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a list of durations, in seconds. All zero where there are none."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the requests of one class, or of all."""

    num_requests: int
    num_ok: int
    num_good: int
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures. Rates are per second of the window."""

    window_s: float
    wall_s: float  # the whole run
    num_requests: int  # due in the window, as are all counts
    num_ok: int
    num_good: int  # kept the SLO; where there is none, succeeded
    refusals: dict[str, int]  # reason -> count
    failures: dict[str, int]
    offered_per_s: float  # requests that were due
    requests_per_s: float
    goodput_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    num_images: int
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    by_kind: dict[str, Latencies]
    send_lag: Distribution  # sent - due
    loop_lag: Distribution  # of the load generator's event loop
    cpu_share: float  # of one core, that the load generator used
    cpu_us_per_piece: float  # its CPU time over all pieces of output it read
    num_without_usage: int  # answers whose tokens had to be counted by pieces
    was_cut: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def num_refused(self) -> int:
        return sum(self.refusals.values())

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def good_share(self) -> float:
        return self.num_good / self.num_requests if self.num_requests else 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """The stretch of a run that counts, on the run's clock."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return max(0.0, self.end_s - self.start_s)

    def has(self, time_s: float) -> bool:
        return self.start_s <= time_s <= self.end_s


class Promise(Protocol):
    """What makes a request good: tools.loadgen.slo.Slo."""

    def holds(self, record: Record) -> bool: ...


def steady_window(run: Run, *, warmup_s: float = 0.0, duration_s: float | None = None) -> Window:
    """From the end of the warm-up to the end of the load, or to the run's end where its length was not given or not reached."""
    # A timer may be early by a fraction of a millisecond, so that a quick answer to the last request is there before it was due.
    whole_s = max((run.end_s, *(record.scheduled_s for record in run.records)))
    end_s = whole_s if duration_s is None else run.start_s + duration_s
    if run.was_cut:
        end_s = min(end_s, run.end_s)
    return Window(min(run.start_s + warmup_s, end_s), end_s)


def distribution(values_s: Sequence[float] | FloatArray) -> Distribution:
    """Mean, maximum and percentiles, linearly interpolated between the two nearest ranks."""
    values = np.asarray(values_s, dtype=np.float64)
    if not len(values):
        return Distribution()
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    return Distribution(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


def summarise(run: Run, window: Window | None = None, slo: Promise | None = None) -> Summary:
    """Everything the reports show; without a window, of the whole run."""
    window = window or steady_window(run)
    due = [record for record in run.records if window.has(record.scheduled_s)]
    done = [record for record in due if record.outcome == OK]
    latencies = _latencies(due, slo)
    send_lag = distribution([record.sent_s - record.scheduled_s for record in due])
    loop_lag = distribution(run.loop_lags_s)
    num_pieces = sum(len(record.piece_times_s) for record in run.records)
    cpu_share = run.cpu_s / run.wall_s if run.wall_s > 0 else 0.0
    per_s = 1.0 / window.length_s if window.length_s > 0 else 0.0
    requests, input_tokens, output_tokens = _arrived(run.records, window)
    kinds = sorted({record.kind for record in due})
    return Summary(
        window_s=window.length_s,
        wall_s=run.wall_s,
        num_requests=len(due),
        num_ok=len(done),
        num_good=latencies.num_good,
        refusals=_reasons(due, REFUSED),
        failures=_reasons(due, FAILED),
        offered_per_s=len(due) * per_s,
        requests_per_s=requests * per_s,
        goodput_per_s=latencies.num_good * per_s,
        input_tokens_per_s=input_tokens * per_s,
        output_tokens_per_s=output_tokens * per_s,
        input_tokens=sum(record.input_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=sum(record.output_tokens for record in done),
        num_images=sum(record.num_images for record in done),
        ttft=latencies.ttft,
        itl=latencies.itl,
        tpot=latencies.tpot,
        e2e=latencies.e2e,
        by_kind={kind: _latencies([record for record in due if record.kind == kind], slo) for kind in kinds},
        send_lag=send_lag,
        loop_lag=loop_lag,
        cpu_share=cpu_share,
        cpu_us_per_piece=1e6 * run.cpu_s / num_pieces if num_pieces else 0.0,
        num_without_usage=sum(not record.has_usage for record in done),
        was_cut=run.was_cut,
        warnings=_warnings(send_lag, loop_lag, cpu_share, latencies.ttft),
    )


def ttft_s(record: Record) -> float:
    """Time to first token of a successful request."""
    return record.piece_times_s[0] - record.scheduled_s


def e2e_s(record: Record) -> float:
    return record.end_s - record.scheduled_s


def tpot_s(record: Record) -> float:
    """Time per output token after the first; the request has at least two of them."""
    return (e2e_s(record) - ttft_s(record)) / (record.output_tokens - 1)


def itls_s(record: Record) -> FloatArray:
    """Gaps between the pieces of output; one fewer than there are pieces."""
    return np.diff(np.asarray(record.piece_times_s, dtype=np.float64))


def _latencies(records: Sequence[Record], slo: Promise | None) -> Latencies:
    done = [record for record in records if record.outcome == OK]
    gaps = [itls_s(record) for record in done]
    return Latencies(
        num_requests=len(records),
        num_ok=len(done),
        num_good=len(done) if slo is None else sum(slo.holds(record) for record in done),
        ttft=distribution([ttft_s(record) for record in done]),
        itl=distribution(np.concatenate(gaps) if gaps else []),
        tpot=distribution([tpot_s(record) for record in done if record.output_tokens > 1]),
        e2e=distribution([e2e_s(record) for record in done]),
    )


def _arrived(records: Iterable[Record], window: Window) -> tuple[int, float, float]:
    """Answers, input tokens (as of the first output) and output tokens that came in the window."""
    num_requests, input_tokens, output_tokens = 0, 0, 0.0
    for record in records:
        if record.outcome != OK:
            continue
        num_requests += window.has(record.end_s)
        times = np.asarray(record.piece_times_s, dtype=np.float64)
        first, last = np.searchsorted(times, window.start_s, "left"), np.searchsorted(times, window.end_s, "right")
        input_tokens += record.input_tokens if window.has(float(times[0])) else 0
        output_tokens += record.output_tokens * (int(last) - int(first)) / len(times)
    return num_requests, input_tokens, output_tokens


def _reasons(records: Iterable[Record], outcome: str) -> dict[str, int]:
    return dict(sorted(Counter(record.reason for record in records if record.outcome == outcome).items()))


def _warnings(send_lag: Distribution, loop_lag: Distribution, cpu_share: float, ttft: Distribution) -> list[str]:
    """Why the figures are the generator's rather than the server's, if they are."""
    found = []
    bound_s = max(MAX_LAG_S, _LAG_SHARE * ttft.p50_s)
    if send_lag.p99_s > bound_s:
        found.append(f"requests were sent late: p99 {1e3 * send_lag.p99_s:.1f} ms, at most {1e3 * send_lag.max_s:.1f} ms")
    if loop_lag.p99_s > MAX_LAG_S:
        found.append(f"its event loop was late: p99 {1e3 * loop_lag.p99_s:.1f} ms, at most {1e3 * loop_lag.max_s:.1f} ms")
    if cpu_share > MAX_CPU_SHARE:
        found.append(f"it used {100 * cpu_share:.0f} % of a core, and has only one for reading")
    return found
