"""What a scrape shows: of a cluster that has served, of one that has not, and of reports that make no sense."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from epd.distribution import STAGE_FIGURES, Spreads
from epd.exposition import MemberLoad
from epd.metrics import GatewayMetrics, Slo
from protocol.messages import LinkLoad, ProcessLoad, Spread, StageLoad, WorkerId
from tests.support.clock import FakeClock
from tests.support.systems import until
from tests.support.world import World, world

WORKER = WorkerId("w")


def _scrape(*members: MemberLoad, metrics: GatewayMetrics | None = None) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels. Parsing fails on what Prometheus would refuse; a series that is there twice fails here."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families((metrics or GatewayMetrics()).render(members).decode()):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series, (sample.name, labels)
            series[labels] = sample.value
            assert sample.name.endswith("_total") == (family.type == "counter" and not sample.name.endswith("_created"))
    return found


def _of_worker(made: World, name: str) -> MemberLoad:
    actors = [actor for actor in made.actors if actor.address.worker == name]
    links = tuple(link for actor in actors for link in actor.links())
    return MemberLoad(WorkerId(name), tuple(actor.load() for actor in actors), links)


async def test_every_stage_of_a_request_is_counted_where_it_ran() -> None:
    async with world({"e0": "encode", "p0": "prefill", "d0": "decode"}) as made:
        prompt = list(range(100, 120))
        await made.run(made.request(prompt, 6, images=[b"an image"], offsets=[4]))
        found = _scrape(*(_of_worker(made, name) for name in ("e0", "p0", "d0")))
    counts = {
        (name.removesuffix("_count"), dict(labels)["role"]): value
        for name, series in found.items()
        for labels, value in series.items()
        if name.startswith("epd_stage") and name.endswith("_count")
    }
    steps = {
        labels: value for labels, value in counts.items() if labels[0] in ("epd_stage_step_seconds", "epd_stage_step_tokens")
    }
    assert {role for _, role in steps} == {"encode", "prefill", "decode"}
    assert steps["epd_stage_step_tokens", "decode"] == 5  # the first token is prefill's
    assert {labels: value for labels, value in counts.items() if labels not in steps} == {
        ("epd_stage_queue_seconds", "encode"): 1,
        ("epd_stage_preprocess_seconds", "encode"): 1,
        ("epd_stage_encode_seconds", "encode"): 1,
        ("epd_stage_queue_seconds", "prefill"): 1,
        ("epd_stage_embedding_wait_seconds", "prefill"): 1,
        ("epd_stage_prefill_seconds", "prefill"): 1,
        ("epd_stage_transfer_seconds", "prefill"): 1,
        ("epd_stage_queue_seconds", "decode"): 1,
        ("epd_stage_kv_receive_seconds", "decode"): 1,
        ("epd_stage_decode_seconds", "decode"): 1,
        ("epd_stage_transfer_seconds", "decode"): counts["epd_stage_transfer_seconds", "decode"],
    }
    tokens = {dict(labels)["role"]: value for labels, value in found["epd_stage_tokens_total"].items()}
    assert tokens == {"encode": 3, "prefill": 20, "decode": 5}
    assert found["epd_link_transfer_bytes_total"][("peer", "p0"), ("rung", "mapped"), ("worker", "d0")] > 0


async def test_a_prefill_that_waits_for_an_image_says_how_long() -> None:
    clock = FakeClock()
    async with world({"e0": "encode", "p0": "prefill", "d0": "decode"}, clock=clock) as made:
        gate = made.encode["e0"].runner.gate
        gate.clear()
        # Two blocks of text go first; then there is nothing to do but wait.
        running = asyncio.create_task(made.run(made.request(list(range(100, 120)), 4, images=[b"slow"], offsets=[8])))
        actor = made.prefill["p0"].actor
        await until(lambda: actor.num_tokens == 8)
        clock.advance(5.0)
        gate.set()
        await running
        waits = [spread for spread in actor.load().spreads if spread.figure == "embedding_wait_seconds"]
        assert [spread.total for spread in waits] == [5.0]


def test_faults_begin_at_zero_and_roles_that_nobody_has_are_there() -> None:
    found = _scrape()
    assert found["epd_workers"] == {(("role", role),): 0.0 for role in ("encode", "prefill", "decode")}
    assert set(found["epd_workers_lost_total"].values()) == {0.0}
    assert found["epd_recoveries_total"][(("reason", "peer_lost"),)] == 0.0
    assert found["epd_attempt_failures_total"][(("code", "corrupt_transfer"),)] == 0.0
    assert found["epd_generation_tokens_total"] == {(): 0.0}


def test_two_stages_that_pull_over_one_link_are_one_series() -> None:
    links = (LinkLoad(WorkerId("p"), "mapped", 2, 100, 0.5), LinkLoad(WorkerId("p"), "mapped", 1, 10, 0.25))
    found = _scrape(MemberLoad(WORKER, (StageLoad("prefill"), StageLoad("decode")), links))
    labels = (("peer", "p"), ("rung", "mapped"), ("worker", "w"))
    assert found["epd_link_transfers_total"] == {labels: 3.0}
    assert found["epd_link_transfer_bytes_total"] == {labels: 110.0}
    assert found["epd_link_transfer_seconds_total"] == {labels: 0.75}


def test_pools_drains_and_failures() -> None:
    stage = StageLoad("decode", num_blocks=8, num_free_blocks=2, num_preemptions=3, transfer_failures=(("corrupt_transfer", 2),))
    found = _scrape(MemberLoad(WORKER, (stage,), is_draining=True), MemberLoad(WorkerId("fresh"), (StageLoad("decode"),)))
    labels = (("role", "decode"), ("worker", "w"))
    assert found["epd_stage_block_usage_ratio"][labels] == 0.75
    assert found["epd_stage_block_usage_ratio"][("role", "decode"), ("worker", "fresh")] == 0.0
    assert found["epd_stage_preemptions_total"][labels] == 3.0
    assert found["epd_stage_transfer_failures_total"][("code", "corrupt_transfer"), *labels] == 2.0
    assert found["epd_worker_draining"] == {(("worker", "w"),): 1.0, (("worker", "fresh"),): 0.0}
    assert found["epd_workers"][(("role", "decode"),)] == 1.0


def test_a_figure_whose_buckets_are_cut_otherwise_is_left_out() -> None:
    spreads = Spreads()
    spreads.observe("queue_seconds", 0.003)
    spreads.observe("transfer_seconds", 0.003, "socket")
    strange = (Spread("queue_seconds", (1, 2), 3.0), Spread("unheard of", (1,), 1.0))
    found = _scrape(MemberLoad(WORKER, (StageLoad("decode", spreads=(*spreads.parts(), *strange)),)))
    buckets = found["epd_stage_queue_seconds_bucket"]
    assert len(buckets) == len(STAGE_FIGURES["queue_seconds"]) + 1
    assert {dict(labels)["le"]: value for labels, value in buckets.items()}["0.005"] == 1.0
    assert found["epd_stage_transfer_seconds_count"] == {(("role", "decode"), ("rung", "socket"), ("worker", "w")): 1.0}


@pytest.mark.parametrize("has_device", [True, False])
def test_only_what_is_known_of_a_device_is_shown(has_device: bool) -> None:
    process = ProcessLoad(2.5, 1000, "H200", 0.5, 10, 20, 300.0) if has_device else ProcessLoad(2.5, 1000)
    found = _scrape(MemberLoad(WORKER, (), process=process))
    assert found["epd_worker_cpu_seconds_total"] == {(("worker", "w"),): 2.5}
    assert found["epd_worker_memory_bytes"] == {(("worker", "w"),): 1000.0}
    shown = {name: value for name, series in found.items() if name.startswith("epd_device") for value in series.values()}
    assert shown == (
        {
            "epd_device_utilisation_ratio": 0.5,
            "epd_device_memory_used_bytes": 10.0,
            "epd_device_memory_bytes": 20.0,
            "epd_device_power_watts": 300.0,
        }
        if has_device
        else {}
    )


def test_requests_are_held_against_the_slos_that_were_set() -> None:
    metrics = GatewayMetrics(Slo(ttft_s=0.5, tpot_s=0.05))
    metrics.judge(ttft_met=True, tpot_met=False)
    found = _scrape(metrics=metrics)
    assert found["epd_slo_seconds"] == {(("slo", "ttft"),): 0.5, (("slo", "tpot"),): 0.05}
    judged = {(dict(labels)["slo"], dict(labels)["met"]): value for labels, value in found["epd_slo_requests_total"].items()}
    assert {key for key, value in judged.items() if value} == {("ttft", "true"), ("tpot", "false"), ("both", "false")}
