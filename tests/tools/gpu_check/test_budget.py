from __future__ import annotations

from tools.gpu_check.budget import LEAST_S, Budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_part_gets_its_limit_or_what_is_left() -> None:
    clock = Clock()
    budget = Budget(60.0, clock)
    assert budget.grant(20.0) == 20.0
    clock.now += 50
    assert (budget.spent_s, budget.left_s) == (50.0, 10.0)
    assert budget.grant(20.0) == 10.0
    clock.now += 10 - LEAST_S / 2
    assert budget.grant(20.0) == 0.0  # not worth beginning
    assert budget.grant(1.0) == 1.0  # all that it may take
    clock.now += 100
    assert (budget.left_s, budget.grant(1.0)) == (0.0, 0.0)
