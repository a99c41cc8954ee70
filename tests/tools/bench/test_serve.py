from __future__ import annotations

import pytest

from tools.bench.rows import meets_bar
from tools.bench.serve import rows
from tools.loadgen.load import Run
from tools.loadgen.stats import Summary, summarise
from tools.loadgen.stream import Record


def summary(gap_s: float, *, reason: str = "") -> Summary:
    times_s = [1.0 + gap_s * index for index in range(11)]
    record = Record(
        index=0,
        scheduled_s=0.0,
        sent_s=0.0,
        piece_times_s=times_s,
        end_s=times_s[-1],
        outcome="failed" if reason else "ok",
        reason=reason,
        output_tokens=11,
        has_usage=True,
    )
    return summarise(Run(0.0, times_s[-1], records=[record]))


def test_the_comparison() -> None:
    found = {row["name"]: row for row in rows(summary(0.1), summary(0.4), 2)}
    output = found["serve, 8 streams: output"]
    assert (output["value"], output["baseline"], output["ratio"]) == pytest.approx((5.5, 2.2, 2.5))
    assert meets_bar(output) is True
    itl = found["serve, 8 streams: p99 ITL"]
    assert (itl["value"], itl["baseline"], itl["ratio"]) == pytest.approx((100.0, 400.0, 0.25))
    assert meets_bar(itl) is True
    assert meets_bar(rows(summary(0.4), summary(0.1), 2)[1]) is False


def test_runs_with_failures_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="transformers serve: 0 of 1"):
        rows(summary(0.1), summary(0.1, reason="wrong_length"), 2)
