from __future__ import annotations

import math

import pytest

from tools.loadgen.arrivals import poisson_arrivals


def test_gaps_are_exponential_with_the_asked_mean() -> None:
    times = list(poisson_arrivals(20.0, seed=1, num_requests=20_000))
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert all(gap > 0 for gap in gaps)
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.03)
    # Of an exponential distribution, the share of gaps longer than the mean is 1 / e, and mean and deviation are equal.
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.03)
    assert math.sqrt(sum((gap - 1 / 20) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(1 / 20, rel=0.05)


def test_equal_seeds_give_equal_arrivals() -> None:
    first, again, other = (list(poisson_arrivals(5.0, seed=seed, num_requests=50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_duration_bounds_the_arrivals() -> None:
    times = list(poisson_arrivals(50.0, seed=2, duration_s=10.0))
    assert max(times) < 10.0
    assert len(times) == pytest.approx(500, rel=0.2)
    assert list(poisson_arrivals(50.0, seed=2, duration_s=10.0, num_requests=7)) == times[:7]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="positive"):
        poisson_arrivals(0.0, seed=0, num_requests=1)
    with pytest.raises(ValueError, match="duration"):
        poisson_arrivals(1.0, seed=0)
