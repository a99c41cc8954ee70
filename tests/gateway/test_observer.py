"""From what happens at a gateway to what is counted, remembered and said of it."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing
from typing import Any

import pytest

from epd.errors import BadImage, Overloaded, PeerLost
from epd.exposition import MemberLoad
from epd.gateway.observer import Observer, RequestWatch
from epd.metrics import GatewayMetrics, Slo
from epd.request import Delta, GenerateRequest
from epd.timeline import Timeline
from protocol.messages import RequestId, Sampling, StageLoad, WorkerId
from tests.support.clock import FakeClock
from tests.support.systems import until
from tests.support.world import world

REQUEST = GenerateRequest(RequestId("r"), (1, 2, 3), (), Sampling())
WORKER = WorkerId("w")


def _observer(clock: FakeClock) -> Observer:
    return Observer(GatewayMetrics(Slo(ttft_s=1.0, tpot_s=0.1)), clock=clock)


def _begin(observer: Observer, clock: FakeClock) -> RequestWatch:
    return observer.admitted(dataclasses.replace(REQUEST, timeline=Timeline(clock)), clock())


def _value(observer: Observer, series: str) -> float:
    lines = observer.metrics.render(()).decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series + " "))


def _kinds(observer: Observer) -> list[tuple[str, str]]:
    return [(event.kind, event.worker) for event in observer.history.events]


def _alerts(observer: Observer) -> list[str]:
    return sorted(observer.alerts.active)


def test_the_times_of_a_request() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    timeline = Timeline(clock)
    clock.advance(0.25)  # in which the prompt was made: its time counts too
    watch = observer.admitted(dataclasses.replace(REQUEST, timeline=timeline), clock())
    clock.advance(0.5)
    watch.delta(clock(), Delta(0, "a", 1, num_cached_tokens=2))
    for _ in range(4):
        clock.advance(0.05)
        watch.delta(clock(), Delta(0, "b", 2))
    watch.finished(clock(), "ok")
    watch.finished(clock(), "cancelled")
    latencies = observer.metrics.latencies
    assert latencies.ttft.total == pytest.approx(0.75)
    assert latencies.itl.num_values == 4
    assert latencies.itl.total == pytest.approx(0.2)
    assert latencies.tpot.total == pytest.approx(0.2 / 8)
    assert latencies.e2e.total == pytest.approx(0.95)
    assert _value(observer, "epd_generation_tokens_total") == 9
    assert _value(observer, "epd_cached_prompt_tokens_total") == 2
    assert _value(observer, 'epd_slo_requests_total{met="true",slo="both"}') == 1
    assert _value(observer, 'epd_requests_total{outcome="cancelled"}') == 0
    assert _value(observer, "epd_requests_running") == 0


def test_gaps_are_of_one_choice_each() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    watch = _begin(observer, clock)
    for index in (0, 1):
        watch.delta(clock(), Delta(index, "a", 1))
    clock.advance(0.05)
    for index in (0, 1):
        watch.delta(clock(), Delta(index, "b", 1))
    assert observer.metrics.latencies.itl.num_values == 2
    assert observer.metrics.latencies.itl.total == pytest.approx(0.1)
    assert observer.metrics.latencies.ttft.num_values == 1


@pytest.mark.parametrize(
    ("ttft_s", "gap_s", "outcome", "judged"),
    [
        (0.9, 0.09, "ok", {"ttft": "true", "tpot": "true", "both": "true"}),
        (1.1, 0.09, "ok", {"ttft": "false", "tpot": "true", "both": "false"}),
        (0.9, 0.11, "ok", {"ttft": "true", "tpot": "false", "both": "false"}),
        (0.9, 0.09, "peer_lost", {"ttft": "false", "tpot": "false", "both": "false"}),
        (9.0, 9.0, "cancelled", {}),
        (9.0, 9.0, "bad_image", {}),
    ],
)
def test_what_counts_for_goodput(ttft_s: float, gap_s: float, outcome: str, judged: dict[str, str]) -> None:
    clock = FakeClock()
    observer = _observer(clock)
    watch = _begin(observer, clock)
    clock.advance(ttft_s)
    watch.delta(clock(), Delta(0, "a", 1))
    clock.advance(gap_s)
    watch.delta(clock(), Delta(0, "b", 1))
    watch.finished(clock(), outcome)
    found = {
        slo: met
        for slo in ("ttft", "tpot", "both")
        for met in ("true", "false")
        if _value(observer, f'epd_slo_requests_total{{met="{met}",slo="{slo}"}}')
    }
    assert found == judged
    assert observer.history.open.num_judged == bool(judged)


def test_refusals_are_counted_by_limit_and_alert_when_there_are_many() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    for _ in range(20):
        observer.refused(Overloaded("full", limit="max_requests"), clock())
    assert _value(observer, 'epd_request_refusals_total{reason="max_requests"}') == 20
    assert [event.count for event in observer.history.events] == [20]
    for _ in range(7):
        clock.advance(2.0)
        observer.describe(after_moment=-1, after_revision=0)
    assert _alerts(observer) == ["EpdRefusals"]
    clock.advance(70.0)
    observer.describe(after_moment=-1, after_revision=0)
    assert _alerts(observer) == []
    assert ("alert ended", "") in _kinds(observer)


def test_the_life_of_a_worker() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    observer.joined(WORKER, ("prefill", "decode"))
    observer.reported(MemberLoad(WORKER, (StageLoad("decode"),)))
    for _ in range(2):
        observer.reported(MemberLoad(WORKER, (StageLoad("decode"),), is_draining=True))
    observer.gone(WORKER, ("prefill", "decode"), is_lost=True)
    assert _alerts(observer) == ["EpdWorkerLost"]
    clock.advance(3.0)
    observer.joined(WORKER, ("prefill", "decode"))
    observer.describe(after_moment=-1, after_revision=0)
    assert _alerts(observer) == []
    observer.gone(WORKER, ("prefill", "decode"), is_lost=False)
    kinds = [kind for kind, _ in _kinds(observer)]
    assert kinds == ["joined", "draining", "lost", "alert", "joined", "alert ended", "left"]
    assert "again" in [event.text for event in observer.history.events][4]
    assert _value(observer, 'epd_workers_joined_total{role="decode"}') == 2
    assert _value(observer, 'epd_workers_lost_total{role="decode"}') == 1
    assert _value(observer, 'epd_workers_left_total{role="prefill"}') == 1


def _stage(**figures: Any) -> MemberLoad:
    return MemberLoad(WORKER, (StageLoad(**figures),))


@pytest.mark.parametrize(
    ("before", "after", "alert"),
    [
        ({"role": "decode", "num_preemptions": 7}, {"role": "decode", "num_preemptions": 12}, "EpdPreemptions"),
        (
            {"role": "decode", "transfer_failures": (("corrupt_transfer", 4),)},
            {"role": "decode", "transfer_failures": (("corrupt_transfer", 5),)},
            "EpdTransferCorrupt",
        ),
        ({"role": "prefill"}, {"role": "prefill", "transfer_failures": (("stale_handle", 3),)}, "EpdTransfersFail"),
        (
            {"role": "encode", "cache_queries": 5},
            {"role": "encode", "cache_queries": 25, "cache_hits": 5, "num_evictions": 30},
            "EpdEncoderCacheThrashes",
        ),
        ({"role": "decode"}, {"role": "decode", "is_idle_clean": False}, "EpdIntegrityCheckFailed"),
    ],
)
def test_what_workers_report_sets_alerts_off(before: dict[str, Any], after: dict[str, Any], alert: str) -> None:
    clock = FakeClock()
    observer = _observer(clock)
    observer.reported(_stage(**before))
    clock.advance(2.0)
    observer.reported(_stage(**before))
    assert _alerts(observer) == []
    clock.advance(2.0)
    observer.reported(_stage(**after))
    assert _alerts(observer) == [alert]
    clock.advance(64.0)
    observer.reported(_stage(**{**after, "is_idle_clean": True}))
    clock.advance(2.0)
    observer.reported(_stage(**{**after, "is_idle_clean": True}))
    assert _alerts(observer) == []


def test_a_worker_that_starts_again_does_not_count_backwards() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    for num in (0, 4, 0, 1):
        clock.advance(2.0)
        observer.reported(_stage(role="decode", num_preemptions=num))
    assert _alerts(observer) == ["EpdPreemptions"]


def test_queues_and_pools_must_stay_full_for_a_minute() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    for number in range(40):
        observer.reported(_stage(role="decode", num_waiting=8 + number, num_blocks=100, num_free_blocks=2))
        assert (_alerts(observer) == ["EpdKvPoolNearlyFull", "EpdQueueGrows"]) == (number >= 29), number
        clock.advance(2.0)
    observer.reported(_stage(role="decode", num_blocks=100, num_free_blocks=100))
    clock.advance(2.0)
    observer.reported(_stage(role="decode", num_blocks=100, num_free_blocks=100))
    assert _alerts(observer) == []


def test_a_clients_own_mistake_is_no_event() -> None:
    clock = FakeClock()
    observer = _observer(clock)
    observer.attempt_failed(BadImage("no image"), WORKER)
    observer.attempt_failed(PeerLost("gone"), WORKER)
    assert _kinds(observer) == [("attempt failed", "w")]
    assert _value(observer, 'epd_attempt_failures_total{code="bad_image"}') == 1


async def test_a_request_that_survives_a_worker_is_a_recovery() -> None:
    async with world({"e0": "encode", "p0": "prefill", "d0": "decode", "d1": "decode"}) as made:
        timeline = Timeline(made.clock)
        request = dataclasses.replace(made.request(list(range(100, 117)), 40), timeline=timeline)
        outputs = made.journey(request).tokens()
        async with aclosing(outputs):
            await anext(outputs)
            await anext(outputs)
            busy = next(name for name, stage in made.decode.items() if not stage.actor.is_idle())
            losing = asyncio.create_task(made.lose(busy))
            num_tokens = 2 + len([output async for output in outputs])
            await losing
        assert num_tokens == 40
        observer = made.observer
        await until(lambda: ("lost", busy) in _kinds(observer))
        codes = ("peer_lost", "unavailable")  # the link is gone, or the actor before it
        assert sum(_value(observer, f'epd_recoveries_total{{reason="{code}"}}') for code in codes) == 1
        assert sum(_value(observer, f'epd_attempt_failures_total{{code="{code}"}}') for code in codes) == 1
        assert _value(observer, "epd_recovery_seconds_count") == 1
        assert _value(observer, 'epd_workers_lost_total{role="decode"}') == 1
        assert _alerts(observer) == ["EpdWorkerLost"]
        assert ("attempt failed", busy) in _kinds(observer)
        failed = [(span.stage, span.worker) for span in timeline.spans() if span.name.startswith("failed: ")]
        assert failed == [("gateway", busy)]
