from __future__ import annotations

import pytest

from tools.loadgen.stats import Distribution, distribution, summarise
from tools.loadgen.stream import Record


def done(index: int, *, sent_s: float = 0.0, times_s: list[float], end_s: float, images: int = 0) -> Record:
    return Record(
        index=index,
        scheduled_s=0.0,
        sent_s=sent_s,
        num_images=images,
        piece_times_s=times_s,
        end_s=end_s,
        outcome="ok",
        input_tokens=10,
        cached_tokens=4,
        output_tokens=len(times_s),
        has_usage=True,
    )


def failed(outcome: str) -> Record:
    return Record(index=0, scheduled_s=0.0, sent_s=0.0, outcome=outcome, end_s=99.0, input_tokens=1000, output_tokens=1000)


def test_figures_of_a_known_run() -> None:
    records = [
        done(0, times_s=[1.0, 1.5, 2.5], end_s=3.0, images=2),
        done(1, times_s=[2.0], end_s=2.0, sent_s=0.25),
        failed("refused"),
        failed("timeout"),
        failed("cut"),
        failed("cut"),
    ]
    summary = summarise(records, wall_s=4.0, loop_lags_s=[0.0, 0.002])
    assert (summary.num_requests, summary.num_ok, summary.num_refused, summary.num_failed) == (6, 2, 1, 3)
    assert summary.failures == {"cut": 2, "timeout": 1}
    assert summary.requests_per_s == 0.5
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens, summary.num_images) == (20, 8, 4, 2)
    assert (summary.input_tokens_per_s, summary.output_tokens_per_s) == (5.0, 1.0)
    assert summary.ttft == Distribution(2, 1.5, 1.5, 1.9, 1.95, 1.99, 2.0)
    assert summary.itl == distribution([0.5, 1.0])
    assert summary.tpot == distribution([1.0])  # (3 - 1) / 2; the answer of one token has none
    assert summary.e2e.mean_s == 2.5
    assert summary.send_lag.max_s == 0.25
    assert summary.loop_lag.mean_s == pytest.approx(0.001)


def test_nothing_succeeded() -> None:
    summary = summarise([failed("connection")], wall_s=0.0)
    assert summary.requests_per_s == 0.0
    assert summary.ttft == Distribution()


def test_percentiles_of_one_to_a_hundred() -> None:
    found = distribution([float(value) for value in range(101)])
    assert (found.p50_s, found.p90_s, found.p95_s, found.p99_s, found.max_s) == (50.0, 90.0, 95.0, 99.0, 100.0)
    assert (found.mean_s, found.count) == (50.0, 101)
