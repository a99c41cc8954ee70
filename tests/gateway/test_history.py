"""Two seconds after two seconds: what a moment keeps, what is forgotten, and what a viewer is told once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.exposition import MemberLoad
from epd.gateway.history import MAX_EVENTS, MAX_MOMENTS, MAX_REQUESTS, MAX_SPANS, MOMENT_S, History, RequestRecord
from epd.metrics import Latencies
from epd.timeline import Timeline
from protocol.messages import LinkLoad, StageLoad, WorkerId
from tests.support.clock import FakeClock

START = 1000.0


def _history() -> History:
    return History(Latencies(), now=START)


def _record(now: float, name: str = "r") -> RequestRecord:
    return RequestRecord(name, now, 10, 1, 1, Timeline(FakeClock(now)))


def _end(history: History, record: RequestRecord, now: float, outcome: str = "ok", *, good: bool | None = True) -> None:
    record.outcome, record.ttft_met, record.tpot_met = outcome, good, good
    history.ended(record, now)


def _seen(history: History, now: float, **after: int) -> dict[str, Any]:
    """As it goes over HTTP."""
    seen: dict[str, Any] = json.loads(json.dumps(history.snapshot(now, **after)))
    return seen


def _member(*stages: StageLoad, links: tuple[LinkLoad, ...] = ()) -> MemberLoad:
    return MemberLoad(WorkerId("w"), stages, links)


def test_a_moment_counts_what_happened_in_it() -> None:
    history = _history()
    first, second, third = (_record(START + at) for at in (0.1, 0.2, 0.3))
    for record in (first, second, third):
        history.arrived(record, record.arrived)
    history.refused(START + 0.4)
    _end(history, first, START + 1.0)
    _end(history, second, START + 1.5, "peer_lost", good=False)
    _end(history, third, START + 2.5, "cancelled", good=None)
    history.advance(START + 4.0)
    one, two = history.last(60.0)
    assert (one.num_arrived, one.num_refused, one.num_ok, one.num_failed, one.num_judged, one.num_good) == (4, 1, 1, 1, 2, 1)
    assert (one.num_ttft_missed, one.num_tpot_missed, one.num_running) == (1, 1, 3)
    assert (two.num_ok, two.num_failed, two.num_judged, two.num_running) == (0, 0, 0, 1)


def test_latencies_are_of_the_moment_they_were_measured_in() -> None:
    latencies = Latencies()
    num_tokens = 0
    history = History(latencies, now=START, num_tokens=lambda: num_tokens)
    latencies.ttft.observe(0.3)
    num_tokens = 5
    history.advance(START + 2.0)
    latencies.ttft.observe(8.0)
    for gap in (0.01, 0.01, 0.01, 1.0):
        latencies.itl.observe(gap)
    num_tokens = 9
    history.advance(START + 4.0)
    history.advance(START + 6.0)
    one, two, three = history.last(60.0)
    assert one.ttft_p50 == pytest.approx(0.3, rel=0.2)
    assert two.ttft_p50 == pytest.approx(8.0, rel=0.2)
    assert two.itl_p50 == pytest.approx(0.01, rel=0.2)
    assert two.itl_p99 == pytest.approx(1.0, rel=0.2)
    assert (three.ttft_p50, three.itl_p99) == (None, None)
    assert [moment.num_tokens for moment in (one, two, three)] == [5, 4, 0]


def test_a_stage_is_shown_by_what_it_did_in_the_moment() -> None:
    history = _history()
    history.reported(_member(StageLoad("decode", busy_s=100.0, cache_hits=50, cache_queries=60, num_steps=9)), START + 0.2)
    history.advance(START + 2.0)
    grown = StageLoad(
        "decode", 3, 2, num_blocks=8, num_free_blocks=6, busy_s=101.0, cache_hits=51, cache_queries=64, num_steps=12
    )
    history.reported(_member(grown), START + 2.2)
    history.advance(START + 4.0)
    history.reported(_member(StageLoad("decode", busy_s=0.5, num_steps=1)), START + 4.2)  # it has started again
    history.advance(START + 6.0)
    points = [moment.stages["w/decode"] for moment in history.last(60.0)]
    assert points == [(0, 0, 0.0, 0.0, None), (3, 2, 0.25, 0.5, 0.25), (0, 0, 0.0, 0.25, None)]
    history.gone("w", START + 6.5)
    history.advance(START + 8.0)
    assert history.last(60.0)[-1].stages == {}


def test_links_are_shown_by_bytes_per_second() -> None:
    history = _history()
    for at, num_bytes in ((0.2, 1_000_000), (2.2, 1_000_000), (4.2, 1_000_800)):
        links = (LinkLoad(WorkerId("p"), "mapped", 1, num_bytes), LinkLoad(WorkerId("p"), "mapped", 1, 0))
        history.reported(_member(StageLoad("decode"), links=links), START + at)
        history.advance(START + at + 1.8)
    # What had moved before this gateway saw it first is of no moment here.
    assert [moment.links for moment in history.last(60.0)] == [{}, {}, {"w<p": 400.0}]


def test_a_viewer_is_told_each_thing_once() -> None:
    history = _history()
    history.event("good", "joined", "worker joined", START, worker="w")
    first, second = _record(START, "first"), _record(START, "second")
    history.arrived(first, START)
    history.arrived(second, START)
    _end(history, first, START + 1.0)
    seen = _seen(history, START + 2.0)
    assert [moment["number"] for moment in seen["moments"]] == [0]
    assert [request["id"] for request in seen["requests"]] == ["first"]
    assert [request["id"] for request in seen["running"]] == ["second"]
    assert [event["kind"] for event in seen["events"]] == ["joined"]
    after = {"after_moment": 0, "after_revision": seen["revision"]}
    again = _seen(history, START + 3.9, **after)
    assert (again["moments"], again["requests"], again["events"]) == ([], [], [])
    _end(history, second, START + 3.9)
    later = _seen(history, START + 4.0, **after)
    assert [moment["number"] for moment in later["moments"]] == [1]
    assert [(request["id"], request["e2e_s"]) for request in later["requests"]] == [("second", pytest.approx(3.9))]
    assert later["running"] == []


def test_an_event_that_repeats_only_counts() -> None:
    history = _history()
    for _ in range(50):
        history.event("warning", "refused", "requests are refused", START + 1.0)
    history.event("bad", "lost", "worker lost", START + 2.0, worker="w")
    before = history.revision
    history.event("warning", "refused", "requests are refused", START + 3.0)
    assert [(event.kind, event.count) for event in history.events] == [("refused", 51), ("lost", 1)]
    assert [event["count"] for event in _seen(history, START + 3.0, after_revision=before)["events"]] == [51]
    history.event("warning", "refused", "requests are refused", START + 60.0)
    assert [event.count for event in history.events] == [51, 1, 1]


def test_everything_is_bounded() -> None:
    history = _history()
    for number in range(MAX_EVENTS + MAX_REQUESTS + MAX_MOMENTS):
        now = START + number * MOMENT_S
        record = _record(now, f"r{number}")
        for _ in range(MAX_SPANS + 5 if number % 100 == 0 else 1):
            record.timeline.add("placement", "gateway", 0.0)
        history.arrived(record, now)
        history.event("info", "kind", f"text {number}", now)
        _end(history, record, now)
    seen = _seen(history, now)
    assert len(seen["moments"]) == MAX_MOMENTS
    assert len(seen["requests"]) == MAX_REQUESTS
    assert len(seen["events"]) == MAX_EVENTS
    many = [request for request in seen["requests"] if request["num_more_spans"]]
    assert [(len(request["spans"]), request["num_more_spans"]) for request in many] == [(MAX_SPANS, 5)]


def test_a_request_that_has_ended_twice_counts_once() -> None:
    history = _history()
    record = _record(START)
    history.arrived(record, START)
    _end(history, record, START + 1)
    _end(history, record, START + 1)
    assert history.open.num_ok == 1


@given(st.lists(st.floats(0, 5000), min_size=1, max_size=20))
def test_moments_follow_each_other_whatever_the_silence(gaps: list[float]) -> None:
    history = _history()
    now = START
    for gap in gaps:
        now += gap
        history.advance(now)
    assert history.open.start <= now + 1e-6
    assert now - history.open.start < MOMENT_S + 1e-6
    numbers = [moment.number for moment in history.last(1e9)]
    assert len(numbers) <= MAX_MOMENTS
    assert numbers == sorted(set(numbers))
    assert all(moment.start == START + moment.number * MOMENT_S for moment in history.last(1e9))
    if numbers:
        assert numbers[-1] == history.open.number - 1
