"""From records and two descriptions of a cluster to figures in device time."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tools.article.cell import cell, sessions_at
from tools.article.drive import Drive, joining_times
from tools.article.workloads import Kind, Promise, Workload
from tools.loadgen.stream import FAILED, OK, Record

PROMISE = Promise(ttft_s=1.0, per_image_s=0.5, tpot_s=0.1)


def record(sent_s: float, ttft_s: float, *, gap_s: float = 0.05, tokens: int = 11, outcome: str = OK, images: int = 0) -> Record:
    times = array("d", [sent_s + ttft_s + gap_s * number for number in range(tokens)])
    reason = "" if outcome == OK else "unfinished"
    return Record(
        0, sent_s, sent_s, piece_times_s=times, end_s=times[-1] if times else 0.0, outcome=outcome, reason=reason,
        output_tokens=tokens if outcome == OK else 0, num_images=images,
    )  # fmt: skip


def described(busy_s: float, late_s: float) -> dict[str, Any]:
    process = {"device_busy_s": busy_s, "device_late_s": late_s, "loop_lag_s": 0.001}
    return {"loop_lag_s": 0.001, "workers": [{"worker": name, "process": process} for name in ("a", "b")]}


def test_times_are_the_devices_and_only_the_held_stretch_counts() -> None:
    early, late = record(0.0, 9.0), record(10.0, 2.0, gap_s=0.1)
    found = Drive([0.0], [early, late], held_s=(10.0, 20.0), lags_s=[0.0])
    got = cell("t", "w", found, described(1.0, 0.0), described(9.0, 0.1), slow=2.0, promise=PROMISE, output_tokens=11)
    assert got.ttft_mean_s == pytest.approx(1.0)
    assert got.num_requests == 1
    assert got.itl_p99_s == pytest.approx(0.05)
    assert got.requests_per_s == pytest.approx(1 / 10 * 2)
    assert got.utilisation == pytest.approx(0.8)
    assert got.doubts == []
    slow = cell("t", "w", found, described(1.0, 0.0), described(9.0, 0.9), slow=2.0, promise=PROMISE, output_tokens=11)
    assert "11.2 %" in slow.doubts[0]


def test_requests_that_were_cut_off_count_as_far_as_they_went() -> None:
    cut = record(10.0, 2.0, tokens=5, outcome=FAILED)
    never = record(10.0, 0.0, tokens=0, outcome=FAILED)
    found = Drive([0.0], [cut, never], held_s=(10.0, 20.0))
    got = cell("t", "w", found, described(0.0, 0.0), described(1.0, 0.0), slow=1.0, promise=PROMISE, output_tokens=10)
    assert (got.num_requests, got.failures) == (1, 0)
    assert got.requests_per_s == pytest.approx(0.5 / 10)


def users(number_that_break: int) -> Drive:
    """User i comes at i and asks at once; from some number on, first tokens are too late."""
    records = [record(i + 0.5, 0.5 if i < number_that_break else 3.0) for i in range(100)]
    return Drive([float(i) for i in range(100)], records, held_s=(100.0, 110.0))


@pytest.mark.parametrize("most", [10, 40, 80])
def test_sessions_are_the_users_at_whom_the_promise_still_held(most: int) -> None:
    sessions, is_open = sessions_at(users(most), PROMISE, 1.0)
    assert not is_open
    assert most / 1.25 <= sessions <= most * 1.1


def test_a_promise_that_nothing_broke_is_open() -> None:
    assert sessions_at(users(1000), PROMISE, 1.0) == (100.0, True)
    assert sessions_at(users(0), PROMISE, 1.0) == (0.0, False)


def test_images_have_more_time_and_slow_devices_too() -> None:
    assert PROMISE.holds(record(0.0, 1.9, images=2), 1.0)
    assert not PROMISE.holds(record(0.0, 1.9), 1.0)
    assert PROMISE.holds(record(0.0, 1.9, gap_s=0.15), 2.0)
    assert not PROMISE.holds(record(0.0, 0.5, gap_s=0.15), 1.0)


def test_who_sends_a_long_prompt_is_patient() -> None:
    promise = Workload("books", (Kind("book", text_tokens=64_000, patience_s=7.0), Kind("note")), 1).promise(PROMISE)
    book, note = record(0.0, 7.5), record(0.0, 7.5)
    book.kind, note.kind = "book", "note"
    assert promise.holds(book, 1.0)
    assert not promise.holds(note, 1.0)


def test_users_come_by_equal_shares_in_equal_times() -> None:
    times = joining_times(64, 30.0)
    assert len(times) == 64
    assert times[:8] == [0.0] * 8
    assert times == sorted(times)
    assert times[-1] == pytest.approx(30.0)
    assert times[15] == pytest.approx(10.0)  # 8 -> 16 -> 32 -> 64
    assert joining_times(1, 5.0) == [0.0]
