from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.loadgen.arrivals import Rate, arrival_times, parse_rate


def steady(rate: float) -> Rate:
    return Rate(rate, rate)


def gaps_of(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise([0.0, *times])]


def test_gaps_of_a_poisson_process_are_exponential_with_the_asked_mean() -> None:
    gaps = gaps_of(arrival_times(steady(20.0), seed=1, num_arrivals=20_000))
    assert all(gap > 0 for gap in gaps)
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.03)
    # Of an exponential distribution, the share of gaps longer than the mean is 1 / e, and mean and deviation are equal.
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.03)
    assert float(np.std(gaps)) == pytest.approx(1 / 20, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 2.5])
def test_burstiness_is_the_deviation_of_the_gaps_over_their_mean(burstiness: float) -> None:
    gaps = gaps_of(arrival_times(steady(50.0), burstiness=burstiness, seed=3, num_arrivals=40_000))
    assert float(np.mean(gaps)) == pytest.approx(1 / 50, rel=0.05)
    assert float(np.std(gaps) / np.mean(gaps)) == pytest.approx(burstiness, rel=0.05)


def test_without_burstiness_arrivals_are_even() -> None:
    assert arrival_times(steady(4.0), burstiness=0.0, duration_s=1.1) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_ramp_follows_its_line() -> None:
    times = np.asarray(arrival_times(Rate(10.0, 190.0), seed=5, duration_s=100.0))
    assert len(times) == pytest.approx(100 * 100, rel=0.05)
    for second in (10, 50, 90):
        expected = 10 + 1.8 * second
        assert int(np.sum(np.abs(times - second) < 5)) / 10 == pytest.approx(expected, rel=0.1)
    even = arrival_times(Rate(1.0, 3.0), burstiness=0.0, duration_s=10.0)
    # After t seconds, t + t^2 / 10 arrivals are expected.
    assert [t + t * t / 10 for t in even] == pytest.approx(range(1, len(even) + 1))


def test_a_ramp_downwards_and_one_of_given_length() -> None:
    down = arrival_times(Rate(3.0, 1.0), burstiness=0.0, duration_s=10.0)
    assert [3 * t - t * t / 10 for t in down] == pytest.approx(range(1, len(down) + 1))
    counted = arrival_times(Rate(1.0, 3.0), burstiness=0.0, num_arrivals=20)
    assert counted[-1] == pytest.approx(10.0)


def test_equal_seeds_give_equal_arrivals() -> None:
    first, again, other = (arrival_times(steady(5.0), seed=seed, num_arrivals=50) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_duration_bounds_the_arrivals() -> None:
    times = arrival_times(steady(50.0), seed=2, duration_s=10.0)
    assert max(times) < 10.0
    assert len(times) == pytest.approx(500, rel=0.2)
    assert arrival_times(steady(50.0), seed=2, duration_s=10.0, num_arrivals=7) == times[:7]


@given(
    st.floats(0.1, 500), st.floats(0.1, 500), st.floats(0, 3), st.floats(0.1, 20), st.integers(0, 100),
)  # fmt: skip
def test_arrivals_ascend_and_fill_the_duration(start: float, end: float, burstiness: float, length_s: float, seed: int) -> None:
    rate = Rate(start, end)
    times = arrival_times(rate, burstiness=burstiness, seed=seed, duration_s=length_s)
    assert all(0 <= before <= after < length_s for before, after in pairwise(times))
    expected = rate.mean * length_s
    assert abs(len(times) - expected) <= 8 * max(1.0, burstiness) * math.sqrt(expected + 1) + 8


@pytest.mark.parametrize(("text", "rate"), [("5", Rate(5, 5)), ("0.5", Rate(0.5, 0.5)), ("1:20", Rate(1, 20))])
def test_rates_as_words(text: str, rate: Rate) -> None:
    assert parse_rate(text) == rate
    assert parse_rate(str(rate)) == rate


@pytest.mark.parametrize("text", ["", "0", "-1", "1:0", "1:2:3", "fast", "inf", "nan", "1:"])
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="positive"):
        arrival_times(steady(0.0), num_arrivals=1)
    with pytest.raises(ValueError, match="duration"):
        arrival_times(steady(1.0))
    with pytest.raises(ValueError, match="burstiness"):
        arrival_times(steady(1.0), burstiness=-1, num_arrivals=1)
    with pytest.raises(ValueError, match="more than"):
        arrival_times(steady(1e9), duration_s=1e6)
