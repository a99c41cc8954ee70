"""Buckets and quantiles, beside the sorted values themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epd.distribution import SECONDS, STAGE_FIGURES, Distribution, coarser, finer, quantile

VALUES = st.lists(st.floats(0, 200, allow_nan=False), min_size=1, max_size=50)


def test_a_bound_belongs_to_its_bucket() -> None:
    spread = Distribution((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1):
        spread.observe(value)
    assert spread.counts == [2, 2, 1]
    assert spread.num_values == 5
    assert spread.total == 6.6


@given(VALUES, st.floats(0, 1))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    spread = Distribution(SECONDS)
    for value in values:
        spread.observe(value)
    found = quantile(spread.bounds, spread.counts, share)
    assert found is not None
    bounds = (0.0, *SECONDS)
    # Rounding may move the rank over the edge between two neighbours.
    ranks = {max(0, min(len(values) - 1, int(share * len(values)) + step)) for step in (-1, 0)}
    true = [sorted(values)[rank] for rank in ranks]
    reach = [(max(b for b in bounds if b < max(v, 1e-9)), min((b for b in SECONDS if b >= v), default=SECONDS[-1])) for v in true]
    assert min(low for low, _ in reach) - 1e-9 <= found <= max(high for _, high in reach) + 1e-9


def test_no_values_have_no_quantile() -> None:
    assert quantile((1.0,), [0, 0], 0.5) is None
    assert quantile((1.0, 2.0), [0, 0, 3], 0.5) == 2.0


@given(VALUES, st.integers(1, 6))
def test_fine_buckets_add_up_to_coarse_ones(values: list[float], parts: int) -> None:
    fine, coarse = Distribution(finer(SECONDS, parts)), Distribution(SECONDS)
    for value in values:
        fine.observe(value)
        coarse.observe(value)
    assert coarser(fine, SECONDS) == coarse.counts
    assert len(fine.bounds) == (len(SECONDS) - 1) * parts + 1


def test_bounds_rise() -> None:
    for bounds in STAGE_FIGURES.values():
        assert list(bounds) == sorted(set(bounds))
        assert list(finer(bounds, 4)) == sorted(set(finer(bounds, 4)))
