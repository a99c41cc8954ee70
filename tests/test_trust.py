"""When figures of emulated devices are doubted."""

from __future__ import annotations

import msgspec
import pytest

from epd.trust import doubts, lag_doubts, since
from protocol.messages import ProcessLoad

FINE = ProcessLoad(1.0, 1, device_busy_s=100.0, device_late_s=1.9, loop_lag_s=0.019, host_busy=0.94)


def test_a_host_that_keeps_up_is_believed() -> None:
    assert doubts("w", FINE) == []


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("device_late_s", 2.1, "2.1 %"), ("loop_lag_s", 0.021, "21 ms"), ("host_busy", 0.96, "96 %")],
)
def test_each_limit_is_held(field: str, value: float, word: str) -> None:
    (doubt,) = doubts("w", msgspec.structs.replace(FINE, **{field: value}))
    assert doubt.startswith("w: ")
    assert word in doubt


def test_only_what_happened_since_is_held_against_it() -> None:
    before = msgspec.structs.replace(FINE, device_busy_s=90.0, device_late_s=0.0)
    assert since(before, FINE) == pytest.approx((10.0, 1.9))
    assert "19.0 %" in doubts("w", FINE, before)[0]
    assert doubts("w", FINE, msgspec.structs.replace(FINE, device_busy_s=99.5, device_late_s=1.0)) == []  # too little to say


def test_a_real_device_is_measured_and_not_doubted() -> None:
    busy = ProcessLoad(1.0, 1, loop_lag_s=1.0, host_busy=1.0)
    assert doubts("w", busy) == []
    assert since(None, busy) == (0.0, 0.0)


def test_a_gateway_has_an_event_loop_only() -> None:
    assert lag_doubts("gateway", 0.5) == ["gateway: event loop late by 500 ms (p99)"]
    assert lag_doubts("gateway", -1.0) == []
