from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.loadgen.knee import KneeSearch


def server_with(capacity: float, *, slope: float = 6.0) -> Callable[[float], float]:
    """The share of good requests at a rate: all up to the capacity, then ever fewer."""
    return lambda rate: 1.0 / (1.0 + math.exp(min(50.0, slope * (rate / capacity - 1.0) * 10)))


def search(share_at: Callable[[float], float], first_rate: float, **options: float) -> KneeSearch:
    found = KneeSearch(first_rate, **options)  # type: ignore[arg-type]
    while (rate := found.next_rate()) is not None:
        found.tell(rate, share_at(rate))
    return found


@given(st.floats(0.2, 500), st.floats(0.2, 500), st.sampled_from([0.02, 0.05, 0.2]))
def test_the_knee_of_a_server_of_known_capacity_is_found(capacity: float, first_rate: float, precision: float) -> None:
    share_at = server_with(capacity)
    found = search(share_at, first_rate, precision=precision, max_probes=40)
    low, high = found.knee, found.ceiling
    assert low is not None
    assert high is not None
    assert share_at(low) >= 0.9 > share_at(high)
    assert high <= low * (1 + precision)
    assert len(found.probes) <= 2 + abs(math.log2(capacity / first_rate)) + math.log2(math.log(2) / math.log(1 + precision)) + 2


def test_probes_are_bounded() -> None:
    found = search(lambda rate: 1.0, 1.0, max_probes=5)
    assert [probe.rate for probe in found.probes] == [1, 2, 4, 8, 16]
    assert (found.knee, found.ceiling, found.is_bracketed) == (16, None, False)
    found = search(lambda rate: 0.0, 1.0, max_probes=3)
    assert [probe.rate for probe in found.probes] == [1, 0.5, 0.25]
    assert (found.knee, found.ceiling, found.is_bracketed) == (None, 0.25, False)


def test_what_is_enough_can_be_said() -> None:
    share_at = server_with(10.0)
    strict, lax = (search(share_at, 1.0, threshold=threshold, max_probes=30) for threshold in (0.99, 0.5))
    assert strict.knee is not None
    assert lax.knee is not None
    assert strict.knee < 10.0
    assert lax.knee == pytest.approx(10.0, rel=0.05)


def test_a_rate_that_held_by_chance_beyond_one_that_did_not_is_not_the_knee() -> None:
    found = KneeSearch(4.0)
    for rate, share in ((4.0, 0.95), (8.0, 0.5), (5.65, 0.2), (4.7, 0.95)):
        found.tell(rate, share)
    found.tell(9.0, 1.0)
    assert (found.knee, found.ceiling) == (4.7, 5.65)
