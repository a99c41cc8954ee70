from __future__ import annotations

import json

import pytest

from tests.tools.loadgen.queue_model import QueueModel
from tools.loadgen.arrivals import Rate
from tools.loadgen.campaign import Harness, Load, find_knee, sweep
from tools.loadgen.knee import KneeSearch
from tools.loadgen.slo import Slo
from tools.loadgen.stream import Record
from tools.loadgen.trace import TraceEntry
from tools.loadgen.workload import LoadRequest, WorkloadSpec

SPEC = WorkloadSpec(model="m")


def harness_of(model: QueueModel, slo: Slo | None = None, spec: WorkloadSpec = SPEC) -> Harness:
    return Harness(model, spec, slo, clock=model.clock, sleep=model.sleep)


def prompts(model: QueueModel) -> list[str]:
    return [json.loads(request.body)["messages"][0]["content"] for request in model.requests]


async def test_the_warm_up_is_not_counted_and_shares_no_prompt_with_the_runs() -> None:
    model = QueueModel(0.01)
    load = Load(concurrency=2, num_chats=5, warmup_chats=4)
    runs = [run async for run in sweep(harness_of(model), [load, load])]
    assert [run.summary.num_requests for run in runs] == [5, 5]
    assert len(model.requests) == 4 + 5 + 5
    assert len(set(prompts(model))) == 14


async def test_seconds_of_warm_up_are_cut_from_the_window() -> None:
    model = QueueModel(0.01)
    load = Load(rate=Rate(10, 10), burstiness=0.0, duration_s=10.0, warmup_s=4.0)
    run = await harness_of(model).measure(load)
    assert (run.window.start_s - run.run.start_s, run.window.length_s) == (4.0, 6.0)
    assert len(run.run.records) == 99
    assert run.summary.num_requests == 60
    assert run.summary.requests_per_s == pytest.approx(10, rel=0.02)


async def test_a_sweep_has_a_run_for_each_load() -> None:
    model = QueueModel(0.01)
    loads = [Load(rate=Rate(rate, rate), duration_s=20.0) for rate in (10.0, 50.0, 200.0)]
    runs = [run async for run in sweep(harness_of(model), loads)]
    assert [run.label for run in runs] == ["10 req/s", "50 req/s", "200 req/s"]
    assert [run.summary.offered_per_s for run in runs] == pytest.approx([10, 50, 200], rel=0.1)
    assert runs[2].summary.requests_per_s == pytest.approx(100, rel=0.05), "it can do no more"
    assert runs[2].summary.ttft.p50_s > 10 * runs[1].summary.ttft.p50_s


async def test_the_knee_of_a_queue_is_near_its_capacity() -> None:
    model = QueueModel(0.02)  # 50 requests/s
    search = KneeSearch(4.0, max_probes=14)
    load = Load(rate=Rate(4, 4), burstiness=0.0, duration_s=60.0)
    runs = [run async for run in find_knee(harness_of(model, Slo(ttft=0.5)), load, search, max_s=1e9)]
    assert search.is_bracketed
    assert search.knee == pytest.approx(50, rel=0.06)
    assert [run.load.rate for run in runs] == [Rate(probe.rate, probe.rate) for probe in search.probes]
    cut = [run for run in runs if run.run.was_cut]
    assert cut, "a probe that is lost is not run to its end"
    assert all(run.summary.good_share < 0.9 for run in cut)


async def test_a_probe_is_not_given_up_for_its_warm_up() -> None:
    class Cold(QueueModel):
        async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
            self.service_s = 0.3 if self.clock.now_s < 1002.0 else 0.001
            return await super().ask(request, scheduled_s, keeps_text=keeps_text)

    model = Cold(0.3)
    load = Load(rate=Rate(3, 3), burstiness=0.0, duration_s=20.0, warmup_s=3.0)
    run = await harness_of(model, Slo(ttft=0.05)).measure(load, max_bad_share=0.0)
    assert not run.run.was_cut
    assert run.summary.good_share == 1.0
    assert sum(not Slo(ttft=0.05).holds(record) for record in run.run.records) == 5


async def test_the_search_ends_in_time() -> None:
    model = QueueModel(0.001)
    search = KneeSearch(1.0, max_probes=50)
    load = Load(rate=Rate(1, 1), duration_s=10.0)
    runs = [run async for run in find_knee(harness_of(model), load, search, max_s=25.0)]
    assert len(runs) == 3
    assert search.ceiling is None


async def test_a_trace_is_replayed_at_its_times() -> None:
    trace = tuple(TraceEntry(at_s, 20 + at_s.__ceil__(), 4, (1,)) for at_s in (0.0, 1.5, 1.5, 4.0))
    model = QueueModel(0.01)
    run = await harness_of(model, spec=WorkloadSpec(model="m", trace=trace)).measure(Load())
    assert [record.scheduled_s - run.run.start_s for record in run.run.records] == pytest.approx([0.0, 1.5, 1.5, 4.0])
    assert [len(prompt.split()) for prompt in prompts(model)] == [20, 22, 22, 24]
    cut = await harness_of(model, spec=WorkloadSpec(model="m", trace=trace)).measure(Load(num_chats=3, duration_s=1.0))
    assert len(cut.run.records) == 1
