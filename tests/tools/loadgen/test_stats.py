from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.loadgen.load import Run
from tools.loadgen.slo import Slo, parse_slo
from tools.loadgen.stats import Distribution, Window, distribution, steady_window, summarise
from tools.loadgen.stream import Record


def done(
    index: int,
    *,
    due_s: float = 0.0,
    sent_s: float = 0.0,
    times_s: list[float],
    end_s: float,
    images: int = 0,
    kind: str = "text",
) -> Record:
    return Record(
        index=index,
        scheduled_s=due_s,
        sent_s=max(sent_s, due_s),
        kind=kind,
        num_images=images,
        piece_times_s=times_s,
        end_s=end_s,
        outcome="ok",
        input_tokens=10,
        cached_tokens=4,
        output_tokens=len(times_s),
        has_usage=True,
    )


def failed(reason: str, outcome: str = "failed") -> Record:
    return Record(
        index=0, scheduled_s=0.0, sent_s=0.0, outcome=outcome, reason=reason, end_s=99.0, input_tokens=1000, output_tokens=1000
    )


def run_of(*records: Record, end_s: float = 4.0, cpu_s: float = 0.0, lags_s: tuple[float, ...] = ()) -> Run:
    return Run(0.0, end_s, records=list(records), cpu_s=cpu_s, loop_lags_s=list(lags_s))


def test_figures_of_a_known_run() -> None:
    records = [
        done(0, times_s=[1.0, 1.5, 2.5], end_s=3.0, images=2, kind="2x720p"),
        done(1, times_s=[2.0], end_s=2.0, sent_s=0.25),
        failed("429 overloaded", "refused"),
        failed("timeout"),
        failed("500"),
        failed("500"),
    ]
    summary = summarise(run_of(*records, cpu_s=1.0, lags_s=(0.0, 0.002)))
    assert (summary.num_requests, summary.num_ok, summary.num_refused, summary.num_failed) == (6, 2, 1, 3)
    assert summary.refusals == {"429 overloaded": 1}
    assert summary.failures == {"500": 2, "timeout": 1}
    assert (summary.requests_per_s, summary.offered_per_s) == (0.5, 1.5)
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens, summary.num_images) == (20, 8, 4, 2)
    assert (summary.input_tokens_per_s, summary.output_tokens_per_s) == (5.0, 1.0)
    assert summary.ttft == Distribution(2, 1.5, 1.5, 1.9, 1.95, 1.99, 2.0)
    assert summary.itl == distribution([0.5, 1.0])
    assert summary.tpot == distribution([1.0])  # (3 - 1) / 2; the answer of one token has none
    assert summary.e2e.mean_s == 2.5
    assert summary.send_lag.max_s == 0.25
    assert summary.loop_lag.mean_s == pytest.approx(0.001)
    assert (summary.cpu_share, summary.cpu_us_per_piece) == (0.25, 250_000)
    assert {kind: (found.num_requests, found.ttft.mean_s) for kind, found in summary.by_kind.items()} == {
        "2x720p": (1, 1.0),
        "text": (5, 2.0),
    }


def test_nothing_succeeded() -> None:
    summary = summarise(run_of(failed("connection"), end_s=0.0))
    assert summary.requests_per_s == 0.0
    assert summary.ttft == Distribution()
    assert summarise(run_of(end_s=0.0)).good_share == 0.0


def test_the_window_counts_who_was_due_and_what_arrived_in_it() -> None:
    records = [
        done(0, due_s=1.0, times_s=[2.0, 4.0, 6.0, 8.0], end_s=8.0),  # due before it; two tokens in it
        done(1, due_s=4.0, times_s=[5.0, 7.0], end_s=7.0),
        done(2, due_s=9.0, times_s=[11.0, 12.0], end_s=12.0),  # ends after it
        done(3, due_s=13.0, times_s=[14.0], end_s=14.0),
    ]
    summary = summarise(run_of(*records, end_s=14.0), Window(3.0, 10.0))
    assert (summary.window_s, summary.num_requests) == (7.0, 2)
    assert summary.ttft == distribution([1.0, 2.0])
    assert summary.requests_per_s == pytest.approx(2 / 7)  # 0 and 1 ended in it
    assert summary.output_tokens_per_s == pytest.approx((3 + 2) / 7)
    assert summary.input_tokens_per_s == pytest.approx(10 / 7)  # only 1 began to answer in it


@pytest.mark.parametrize(
    ("warmup_s", "duration_s", "window"),
    [
        (0.0, None, Window(5.0, 25.0)),
        (2.0, 10.0, Window(7.0, 15.0)),
        (2.0, 60.0, Window(7.0, 65.0)),
        (99.0, None, Window(25.0, 25.0)),
    ],
)
def test_the_steady_window(warmup_s: float, duration_s: float | None, window: Window) -> None:
    assert steady_window(Run(5.0, 25.0), warmup_s=warmup_s, duration_s=duration_s) == window
    cut = steady_window(Run(5.0, 25.0, was_cut=True), warmup_s=warmup_s, duration_s=duration_s)
    assert cut == Window(window.start_s, min(window.end_s, 25.0))


def test_an_answer_that_is_there_before_its_request_was_due_counts() -> None:
    """Timers may be early by a fraction of a millisecond."""
    run = Run(5.0, 25.0, records=[Record(0, 25.0004, 25.0)])
    assert steady_window(run).has(25.0004)


def test_goodput() -> None:
    good = done(0, times_s=[0.5, 0.6, 0.7], end_s=0.7)
    late = done(1, times_s=[1.5, 1.6, 1.7], end_s=1.7)
    slow = done(2, times_s=[0.5, 0.6, 1.4], end_s=1.4)
    run = run_of(good, late, slow, failed("500"), failed("429", "refused"))
    for slo, num_good in ((None, 3), (Slo(ttft=1.0), 2), (Slo(itl=0.5), 2), (Slo(ttft=1.0, itl=0.5), 1), (Slo(e2e=1.0), 1)):
        summary = summarise(run, slo=slo)
        assert (summary.num_good, summary.goodput_per_s, summary.good_share) == (num_good, num_good / 4.0, num_good / 5)


def test_gaps_are_judged_by_their_99th_percentile_and_their_mean() -> None:
    times_s = [0.1 * number for number in range(1, 202)]
    hiccup = [*times_s[:100], *(time_s + 0.9 for time_s in times_s[100:])]  # one gap of 200 is a second
    stutter = [*times_s[:100], *(time_s + 0.9 for time_s in times_s[100:110]), *(time_s + 1.8 for time_s in times_s[110:])]
    stutter = [time_s + 0.9 * (number > 50) for number, time_s in enumerate(stutter)]
    assert Slo(itl=0.15).holds(done(0, times_s=hiccup, end_s=hiccup[-1]))
    assert not Slo(itl=0.15).holds(done(0, times_s=stutter, end_s=stutter[-1]))
    assert Slo(tpot=0.11).holds(done(0, times_s=hiccup, end_s=hiccup[-1]))
    assert not Slo(tpot=0.101).holds(done(0, times_s=hiccup, end_s=hiccup[-1]))
    assert Slo(itl=1e-9, tpot=1e-9).holds(done(0, times_s=[1.0], end_s=1.0)), "one token has no gap"


@pytest.mark.parametrize("text", ["ttft=1", "ttft=0.5,itl=0.05,e2e=10", "tpot=0.1"])
def test_an_slo_as_words(text: str) -> None:
    assert parse_slo(str(parse_slo(text))) == parse_slo(text)
    assert parse_slo("ttft=0.5, e2e=9") == Slo(ttft=0.5, e2e=9)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=x", "ttft=0", "speed=1", "ttft=1,,", "itl=inf"])
def test_no_slo(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttft|known"):
        parse_slo(text)


def test_a_generator_that_was_late_says_so() -> None:
    fine = summarise(run_of(done(0, times_s=[1.0], end_s=1.0), cpu_s=0.4, lags_s=(0.001,) * 99))
    assert fine.warnings == []
    late = summarise(run_of(done(0, times_s=[1.0], end_s=1.0, sent_s=0.3), cpu_s=3.9, lags_s=(0.02,) * 99))
    words = " ".join(late.warnings)
    assert len(late.warnings) == 3
    assert "p99 300.0 ms" in words
    assert "p99 20.0 ms" in words
    assert "98 % of a core" in words
    slow_server = summarise(run_of(done(0, times_s=[3.0], end_s=3.0, sent_s=0.1)))
    assert slow_server.warnings == [], "a lag that is nothing beside what is measured does not matter"


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=60))
def test_percentiles_are_the_textbooks(values: list[float]) -> None:
    found = distribution(values)
    ranked = sorted(values)

    def interpolated(percent: int) -> float:
        place = (len(ranked) - 1) * percent / 100
        low = math.floor(place)
        return ranked[low] + (ranked[min(low + 1, len(ranked) - 1)] - ranked[low]) * (place - low)

    assert (found.count, found.max_s) == (len(values), ranked[-1])
    assert found.mean_s == pytest.approx(math.fsum(values) / len(values))
    for percent, value in ((50, found.p50_s), (90, found.p90_s), (95, found.p95_s), (99, found.p99_s)):
        assert value == pytest.approx(interpolated(percent), abs=1e-9)
