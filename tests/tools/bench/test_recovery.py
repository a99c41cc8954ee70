"""Which requests had to go elsewhere, how soon, and with which text: from what clients and the server noted."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tools.bench.recovery import SCENARIOS, recovery, rows
from tools.bench.rows import meets_bar
from tools.loadgen.stream import OK, Record

DECODE, PREFILL = SCENARIOS[0], SCENARIOS[3]


def span(name: str, stage: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {"name": name, "stage": stage, "start_s": start_s, "end_s": end_s}


def record(index: int, *, placed_at: tuple[float, ...], text: str = "same", outcome: str = OK) -> Record:
    """Sent at 100 s, a token at every tenth of a second up to 102 s; `placed_at`: seconds since it was sent."""
    spans = [*(span("placement", "gateway", at_s - 0.001, at_s) for at_s in placed_at), span("step", "decode", 0.0, 9.0)]
    times = [100.0 + number / 10 for number in range(1, 21)]
    return Record(index, 100.0, 100.0, outcome=outcome, text=text, piece_times_s=times, spans=spans)


def test_only_those_that_were_placed_again_count() -> None:
    peace = [record(index, placed_at=(0.01,)) for index in range(3)]
    found = recovery(peace, [peace[0], record(1, placed_at=(0.01, 1.03)), record(2, placed_at=(0.0, 1.02, 1.18))], 101.0)
    assert found.placed_s == pytest.approx((0.03, 0.18))
    assert found.next_s == pytest.approx((0.1, 0.2))
    assert (found.num_requests, found.num_altered) == (3, 0)


def test_an_image_that_was_lost_counts_from_when_another_worker_began_with_it() -> None:
    peace = [record(0, placed_at=(0.01,))]
    lost = record(0, placed_at=(0.01,))
    images = [("failed: peer_lost", 0.02, 1.02), ("encode", 0.03, 0.5), ("encode wait", 1.06, 1.2), ("encode", 1.2, 1.3)]
    lost.spans = [*lost.spans, *(span(name, "encode", start_s, end_s) for name, start_s, end_s in images)]
    found = recovery(peace, [lost], 101.0)
    assert found.placed_s == pytest.approx((0.06,))
    assert found.next_s == pytest.approx((0.1,))


def test_a_text_that_is_not_what_it_would_have_been_is_counted() -> None:
    peace = [record(0, placed_at=(0.01,)), record(1, placed_at=(0.01,))]
    found = recovery(peace, [record(1, placed_at=(0.01, 1.03), text="other"), peace[0]], 101.0)
    assert found.num_altered == 1
    assert [meets_bar(row) for row in rows(DECODE, found)] == [True, None, None, False]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record(0, placed_at=(0.0, 1.1)), record(1, placed_at=(0.0,), outcome="failed")], "1 requests failed"),
        ([record(0, placed_at=(0.0,)), record(1, placed_at=(0.0,))], "the worker had no requests"),
    ],
)
def test_what_says_nothing_is_no_result(records: list[Record], message: str) -> None:
    peace = [record(0, placed_at=(0.0,)), record(1, placed_at=(0.0,))]
    with pytest.raises(RuntimeError, match=message):
        recovery(peace, records, 101.0)


def test_the_rows_of_a_scenario() -> None:
    peace = [record(0, placed_at=(0.0,))]
    found = recovery(peace, [record(0, placed_at=(0.0, 1.05))], 101.0)
    assert [(row["name"].rpartition(": ")[2], round(row["value"])) for row in rows(DECODE, found)] == [
        ("placed anew, last", 50),
        ("next token, p50", 100),
        ("next token, last", 100),
        ("texts altered", 0),
    ]
    assert [row["name"].rpartition(": ")[2] for row in rows(PREFILL, found)] == ["placed anew, last", "texts altered"]
    late = recovery(peace, [record(0, placed_at=(0.0, 1.05))], 99.0)
    assert meets_bar(rows(DECODE, late)[0]) is False


def test_every_victim_has_others_of_its_role() -> None:
    for scenario in SCENARIOS:
        assert scenario.workers.count(scenario.workers[scenario.victim]) > 1
        assert scenario.number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
