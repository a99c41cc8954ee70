from __future__ import annotations

import math

import pytest

from epd.blame import Suspects


def _blamed(culprits: set[int], num_parts: int) -> tuple[list[int], int]:
    """Parts that failed alone, and how many steps were tried after the first one had failed."""
    suspects: Suspects[int] = Suspects()
    suspects.add(range(num_parts))
    found: list[int] = []
    fine: list[int] = []
    num_steps = 0
    while group := suspects.next(lambda _: True):
        num_steps += 1
        if not culprits & set(group):
            fine += group
        elif len(group) == 1:
            found += group
        else:
            suspects.add(group)
    assert sorted([*found, *fine]) == list(range(num_parts))  # everybody's step was made, or failed alone
    return found, num_steps


@pytest.mark.parametrize("num_parts", [2, 3, 7, 64, 255])
def test_one_culprit_is_found_in_few_steps(num_parts: int) -> None:
    for culprit in {0, num_parts // 2, num_parts - 1}:
        found, num_steps = _blamed({culprit}, num_parts)
        assert found == [culprit]
        assert num_steps <= 2 * math.ceil(math.log2(num_parts))


def test_when_all_are_to_blame_the_steps_are_bounded() -> None:
    found, num_steps = _blamed(set(range(40)), 40)
    assert sorted(found) == list(range(40))
    assert num_steps <= 2 * 40


def test_who_has_gone_is_not_tried_again() -> None:
    suspects: Suspects[str] = Suspects()
    suspects.add("abcd")
    assert suspects.next(lambda part: part not in "ab") == ("c", "d")
    assert suspects.next(lambda part: True) == ()
    assert not suspects
