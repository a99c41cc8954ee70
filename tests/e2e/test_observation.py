"""What a real cluster of processes tells of itself after it has served: the scrape, the live figures, `epd top`."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.mix import ask_one_by_one, cases
from tests.support.cluster import ALL_ROLES, Process, ProcessCluster, get_json, node_cluster, wait_until
from tests.support.collector import Collector
from tests.support.scrape import full_scrape


def _scrape(url: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            assert frozenset(sample.labels.items()) not in series, sample
            series[frozenset(sample.labels.items())] = sample.value
    return found


async def test_one_scrape_shows_every_stage_of_every_worker(cluster: ProcessCluster) -> None:
    await ask_one_by_one(cluster.url, cases())
    cluster.wait_until_idle()
    found = _scrape(cluster.url)
    missing = full_scrape().keys() - found.keys() - {"up"}
    assert {name for name in missing if not name.startswith(("epd_device_", "epd_emulated_"))} == set()  # of other devices
    served = {dict(labels)["worker"] for labels, value in found["epd_stage_steps_total"].items() if value}
    assert {"prefill-0", "decode-0"} < served
    rungs = {dict(labels)["rung"] for labels, value in found["epd_link_transfer_bytes_total"].items() if value}
    assert rungs == {"mapped"}
    # What the gateway saw and what its workers did is the same.
    drawn = sum(value for labels, value in found["epd_stage_tokens_total"].items() if ("role", "decode") in labels)
    firsts = sum(value for labels, value in found["epd_stage_prefill_seconds_count"].items())
    assert drawn + firsts >= found["epd_generation_tokens_total"][frozenset()] > 0
    assert all(value > 0 for value in found["epd_worker_memory_bytes"].values())
    assert len(found["epd_worker_memory_bytes"]) == 4


async def test_the_live_figures_have_the_walk_of_a_request(cluster: ProcessCluster) -> None:
    await ask_one_by_one(cluster.url, [case for case in cases() if case.name.startswith("one image")][:1])
    live = get_json(f"{cluster.url}/v1/cluster/live")
    request = live["requests"][-1]
    assert request["outcome"] == "ok"
    stages = {stage for _, stage, _, _, _ in request["spans"]}
    assert {"gateway", "prefill", "decode"} <= stages
    assert all(0 <= start <= end <= request["e2e_s"] + 1.0 for _, _, _, start, end in request["spans"])
    wait_until(lambda: bool(get_json(f"{cluster.url}/v1/cluster/live")["moments"]), "a moment to pass")
    later = get_json(f"{cluster.url}/v1/cluster/live?after_revision={live['revision']}")
    assert later["requests"] == []
    assert {worker["worker"] for worker in later["workers"]} == {"encode-0", "encode-1", "prefill-0", "decode-0"}


def test_top_prints_a_frame(cluster: ProcessCluster) -> None:
    process = Process("top", "--once", "--url", cluster.url, environment={"COLUMNS": "160"})
    try:
        assert process.wait() == 0
        text = "\n".join(process.lines)
        for words in ("tiny-vl", "ready", "encode-0", "prefill-0", "decode-0", "goodput"):
            assert words in text, words
    finally:
        process.close()


async def test_traces_of_requests_reach_a_collector() -> None:
    collector = Collector()
    try:
        async with node_cluster((ALL_ROLES,), "--otlp-endpoint", collector.url) as nodes:
            await ask_one_by_one(nodes.url, [case for case in cases() if case.name.startswith("one image")][:1])
            await nodes.idle()
        assert {"request", "tokenize", "placement", "encode", "prefill", "decode"} <= set(collector.names)
    finally:
        collector.close()
