"""Credit of one direction: a sender that counts its room and the receiver that gives it back agree whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.credit import Intake
from protocol.frames import ProtocolError


@given(st.integers(1, 40), st.lists(st.booleans(), max_size=300))
def test_room_never_runs_out_while_all_is_taken_and_never_exceeds_the_window(window: int, arrivals: list[bool]) -> None:
    intake, room, untaken = Intake(window), window, 0
    for arrives in arrivals:
        if arrives and room:
            intake.arrive("items")
            room, untaken = room - 1, untaken + 1
        elif untaken:
            room, untaken = room + intake.take(), untaken - 1
        assert 0 <= room <= window - untaken
    for _ in range(untaken):
        room += intake.take()
    assert 2 * room > window  # less than half of it is kept back


@given(st.integers(1, 40))
def test_more_than_there_was_room_for_is_the_senders_mistake(window: int) -> None:
    intake = Intake(window)
    for _ in range(window):
        intake.arrive("items")
    with pytest.raises(ProtocolError, match="more items than there was room for"):
        intake.arrive("items")
