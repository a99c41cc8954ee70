from __future__ import annotations

import pytest

from tools.bench import handoff_stages


def test_hand_offs_are_measured_over_the_rung_that_they_are_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_stages, "NUM_FIRST", 1)
    monkeypatch.setattr(handoff_stages, "NUM_HANDOFFS", 2)
    mapped, socket = handoff_stages.run()
    assert (mapped["bar"], socket["bar"]) == ("<1", "")
    assert min(mapped["value"], socket["value"]) > 0
