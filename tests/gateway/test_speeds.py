"""What a token takes on whose device, from load reports."""

from __future__ import annotations

import pytest

from epd.gateway.speeds import Speeds
from protocol.messages import StageLoad, WorkerId

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def did(busy_s: float, num_tokens: int, role: str = "prefill") -> StageLoad:
    return StageLoad(role, busy_s=busy_s, num_tokens=num_tokens)


def test_seconds_of_steps_by_tokens() -> None:
    speeds = Speeds()
    speeds.report(A, did(2.0, 1000))
    assert speeds.token_s(A, "prefill") == pytest.approx(2e-3)


def test_who_has_not_worked_is_like_the_others_of_its_stage() -> None:
    speeds = Speeds()
    first = speeds.token_s(A, "prefill")
    assert first > 0
    speeds.report(A, did(0.0, 0))
    assert speeds.token_s(A, "prefill") == first
    speeds.report(B, did(1.0, 1000))
    speeds.report(C, did(3.0, 1000))
    assert speeds.token_s(A, "prefill") == pytest.approx(2e-3)
    assert speeds.token_s(A, "encode") == pytest.approx(first)


def test_workers_of_about_one_speed_have_one() -> None:
    speeds = Speeds()
    speeds.report(A, did(1.0, 1000))
    speeds.report(B, did(1.2, 1000))
    assert speeds.token_s(A, "prefill") == speeds.token_s(B, "prefill") == pytest.approx(1.1e-3)
    speeds.report(B, did(4.2, 2000))
    assert speeds.token_s(A, "prefill") < 0.6 * speeds.token_s(B, "prefill")


def test_one_slow_step_says_little_and_a_second_of_them_much() -> None:
    speeds = Speeds()
    speeds.report(A, did(1.0, 1000))
    speeds.report(B, did(0.03, 3))
    assert speeds.token_s(A, "prefill") < speeds.token_s(B, "prefill") < 1.5 * speeds.token_s(A, "prefill")
    speeds.report(B, did(1.03, 103))
    assert speeds.token_s(B, "prefill") > 5 * speeds.token_s(A, "prefill")


def test_what_was_long_ago_counts_little() -> None:
    speeds = Speeds()
    speeds.report(A, did(1.0, 100))
    for _ in range(20):
        speeds.report(A, did(1.0, 100))  # the same report again
    assert speeds.token_s(A, "prefill") == pytest.approx(1e-2)
    speeds.report(A, did(3.0, 100 + 2000))
    assert speeds.token_s(A, "prefill") == pytest.approx((1.0 * 0.5 + 2.0) / (100 * 0.5 + 2000))
    for second in range(20):
        speeds.report(A, did(4.0 + second, 3100 + 1000 * second))
    assert speeds.token_s(A, "prefill") == pytest.approx(1e-3, rel=0.01)


def test_a_worker_that_begins_anew_is_believed_from_its_next_report_on() -> None:
    speeds = Speeds()
    speeds.report(A, did(100.0, 100_000))
    speeds.report(A, did(0.5, 1000))
    assert speeds.token_s(A, "prefill") == pytest.approx(1e-3)
    speeds.report(A, did(2.5, 1500))
    assert speeds.token_s(A, "prefill") == pytest.approx((4.0 * 0.5 + 2.0) / (4000 * 0.5 + 500))


def test_hours_of_work_before_the_first_report_do_not_outweigh_the_present() -> None:
    speeds = Speeds()
    speeds.report(A, did(36_000.0, 36_000_000))
    speeds.report(A, did(36_008.0, 36_002_000))
    assert speeds.token_s(A, "prefill") > 1.7e-3


def test_a_worker_that_is_gone_is_forgotten() -> None:
    speeds = Speeds()
    speeds.report(A, did(1.0, 1000))
    speeds.report(B, did(9.0, 1000))
    speeds.forget(B)
    assert speeds.token_s(B, "prefill") == speeds.token_s(A, "prefill") == pytest.approx(1e-3)


def test_decode_does_not_go_by_tokens() -> None:
    speeds = Speeds()
    speeds.report(A, did(1.0, 1000, "decode"))
    assert speeds.token_s(A, "decode") == 0.0
