from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.sizing.queueing import Wait, erlang_c, quantile, waiting


@pytest.mark.parametrize(
    ("load", "servers", "chance"),
    [(0.5, 1, 0.5), (1.0, 2, 1 / 3), (2.0, 3, 4 / 9), (0.0, 4, 0.0)],  # of the textbooks
)
def test_erlangs_formula(load: float, servers: int, chance: float) -> None:
    assert erlang_c(load, servers) == pytest.approx(chance)


def test_one_server_is_pollaczek_khinchine() -> None:
    assert waiting(0.5, 1.0, 1, service_cv2=1.0).mean_s == pytest.approx(1.0)  # M/M/1: rho / (1 - rho)
    assert waiting(0.5, 1.0, 1, service_cv2=0.0).mean_s == pytest.approx(0.5)  # M/D/1: half of that


@given(st.floats(0.01, 0.98), st.integers(1, 60), st.floats(0.001, 10.0))
def test_more_servers_and_less_load_mean_less_waiting(share: float, servers: int, service_s: float) -> None:
    rate = share * servers / service_s
    here = waiting(rate, service_s, servers).mean_s
    assert waiting(rate, service_s, servers + 1).mean_s <= here
    assert waiting(0.9 * rate, service_s, servers).mean_s <= here
    assert here >= 0


def test_what_cannot_keep_up_waits_for_ever() -> None:
    assert waiting(2.0, 1.0, 2).mean_s == math.inf
    assert waiting(0.0, 1.0, 0).mean_s == 0.0


def test_quantiles_of_waits_one_after_another() -> None:
    waits = [Wait(0.2, 0.5), Wait(0.0, 0.0)]
    assert quantile(0.5, [(1.0, 1.0, waits)]) == pytest.approx(1.2, rel=1e-3)
    assert quantile(0.9, [(1.0, 1.0, waits)]) == pytest.approx(1.2 + 1.2816 * math.sqrt(0.12), rel=1e-3)


def test_quantiles_of_a_mix_are_those_of_its_slow_kind() -> None:
    mix = [(0.8, 1.0, [Wait(0.0, 0.0)]), (0.2, 5.0, [Wait(0.0, 0.0)])]
    assert quantile(0.5, mix) == pytest.approx(1.0, rel=1e-3)
    assert quantile(0.9, mix) == pytest.approx(5.0, rel=1e-3)
