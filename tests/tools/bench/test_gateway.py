"""Of a token it is known when it was due."""

from __future__ import annotations

import numpy as np
import pytest

from tools.bench.gateway import STEP_S, Point, added, rows
from tools.bench.rows import meets_bar


@pytest.mark.parametrize("phase_s", [0.0, 0.03, 0.099])
def test_what_a_token_came_later_than_its_step(phase_s: float) -> None:
    late = np.random.default_rng(1).uniform(0.001, 0.250, 50)  # some come later than a whole step
    late[7] = 0.002
    times = 12.3 // STEP_S * STEP_S + phase_s + STEP_S * np.arange(50) + late
    assert added(times, phase_s) == pytest.approx(late, abs=1e-9)


def test_the_rows_of_a_point() -> None:
    point = Point(100, 8, np.full(5000, 0.004), 5000, 5.0, 0.25, 0.5, 0.1, 0.001, 3.0)
    found = {row["name"].rpartition(": ")[2]: row for row in rows([point])}
    assert found["output"]["ratio"] == pytest.approx(1.0)
    assert meets_bar(found["output"])
    assert found["CPU per token, gateway"]["value"] == pytest.approx(50.0)
    assert found["CPU per token, workers"]["value"] == pytest.approx(100.0)
    assert found["added to a token, p99"]["value"] == pytest.approx(4.0)
    assert found["devices late by"]["value"] == pytest.approx(0.1)
