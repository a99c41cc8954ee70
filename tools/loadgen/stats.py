"""From records to figures. Pure.

TTFT: first piece of output - due time. ITL: gap between two pieces of output (sending several tokens at once means fewer and
longer gaps). E2E: end of the stream - due time. TPOT: (E2E - TTFT) / (output tokens - 1), for answers of at least two tokens.
Only successful requests count for latencies and throughput; the others are counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tools.loadgen.stream import OK, REFUSED, Record


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
class Summary:
    """One run in figures. Rates are per second of wall time, from the start to the end of the last request."""

    wall_s: float
    num_requests: int
    num_ok: int
    num_refused: int
    failures: dict[str, int]  # reason -> count; refusals are not among them
    requests_per_s: float
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
    send_lag: Distribution  # sent - due
    loop_lag: Distribution  # of the load generator's event loop
    num_without_usage: int  # answers whose tokens had to be counted by pieces

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


def distribution(values_s: Sequence[float]) -> Distribution:
    """Mean, maximum and percentiles, linearly interpolated between the two nearest ranks."""
    if not values_s:
        return Distribution()
    values = np.asarray(values_s, dtype=np.float64)
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    return Distribution(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


def summarise(records: Iterable[Record], *, wall_s: float, loop_lags_s: Sequence[float] = ()) -> Summary:
    """Everything the report shows."""
    records = list(records)
    done = [record for record in records if record.outcome == OK]
    outcomes = Counter(record.outcome for record in records)
    failures = {reason: count for reason, count in sorted(outcomes.items()) if reason not in (OK, REFUSED)}
    input_tokens = sum(record.input_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    per_s = 1.0 / wall_s if wall_s > 0 else 0.0
    return Summary(
        wall_s=wall_s,
        num_requests=len(records),
        num_ok=len(done),
        num_refused=outcomes[REFUSED],
        failures=failures,
        requests_per_s=len(done) * per_s,
        input_tokens_per_s=input_tokens * per_s,
        output_tokens_per_s=output_tokens * per_s,
        input_tokens=input_tokens,
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=output_tokens,
        num_images=sum(record.num_images for record in done),
        ttft=distribution([ttft_s(record) for record in done]),
        itl=distribution([gap for record in done for gap in itls_s(record)]),
        tpot=distribution([tpot_s(record) for record in done if record.output_tokens > 1]),
        e2e=distribution([e2e_s(record) for record in done]),
        send_lag=distribution([record.sent_s - record.scheduled_s for record in records]),
        loop_lag=distribution(loop_lags_s),
        num_without_usage=sum(not record.has_usage for record in done),
    )


def ttft_s(record: Record) -> float:
    """Time to first token of a successful request."""
    return record.piece_times_s[0] - record.scheduled_s


def e2e_s(record: Record) -> float:
    return record.end_s - record.scheduled_s


def tpot_s(record: Record) -> float:
    """Time per output token after the first; the request has at least two of them."""
    return (e2e_s(record) - ttft_s(record)) / (record.output_tokens - 1)


def itls_s(record: Record) -> list[float]:
    """Gaps between the pieces of output; one fewer than there are pieces."""
    times = record.piece_times_s
    return [after - before for before, after in pairwise(times)]
