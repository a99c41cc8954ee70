from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from epd.config import ClusterConfig, ServeConfig, parse
from epd.options import BUNDLED_MODEL
from tools.gpu_check import serving
from tools.gpu_check.found import Missing
from tools.gpu_check.serving import (
    COLOCATED,
    ONE_PROCESS,
    PROCESSES,
    Measured,
    Setup,
    Traffic,
    _one,
    commands,
    load_rows,
    moved_row,
    run,
)
from tools.loadgen.mix import parse_mix
from tools.servers import ServerFailed


def summary(scale: float) -> dict[str, Any]:
    times = {"p50_s": 0.1 * scale, "p99_s": 0.2 * scale}
    return {"num_ok": 9, "num_requests": 10, "goodput_per_s": 4.0 / scale, "ttft": times, "itl": times}


def cluster(num_bytes: int, num_transfers: int) -> dict[str, Any]:
    return {"workers": [{"links": [{"rung": "local", "num_bytes": num_bytes, "num_transfers": num_transfers}]}]}


def test_rows_of_one_load_stand_beside_the_one_actor() -> None:
    rows = load_rows(PROCESSES, Measured(6.0, summary(1.0), 0.5), Measured(6.0, summary(2.0), 0.25))
    assert [row["name"].removeprefix("serving at 6/s, three processes: ") for row in rows] == [
        "requests that meet TTFT 1 s, ITL 50 ms",
        *("TTFT p50", "TTFT p99", "ITL p50", "ITL p99"),
        "GPU busy",
    ]
    assert [(row["value"], row["baseline"]) for row in rows] == [
        (4.0, 2.0),
        *((100.0, 200.0), (200.0, 400.0)) * 2,
        (50.0, 25.0),
    ]
    assert [row["unit"] for row in rows] == ["req/s", "ms", "ms", "ms", "ms", "%"]
    assert "9 of 10 requests succeeded" in rows[0].get("note", "")


def test_without_the_one_actor_and_nvml_there_are_fewer() -> None:
    rows = load_rows(PROCESSES, Measured(6.0, summary(1.0), None), None)
    assert [row["baseline"] for row in rows] == [None] * 5


def test_what_moves_between_stages_of_one_process() -> None:
    row = moved_row(cluster(0, 8))
    assert not isinstance(row, Missing)
    assert (row["value"], row["unit"], row["bar"]) == (0.0, "bytes", "<=0")
    assert "8 handoffs" in row.get("note", "")
    moved = moved_row(cluster(4096, 8))
    assert not isinstance(moved, Missing)
    assert moved["value"] == 4096.0
    assert isinstance(moved_row(cluster(0, 0)), Missing)  # nothing was counted: that proves nothing


def test_servers_are_started_with_options_that_exist() -> None:
    found = commands(Setup(folder="here", seconds=1.0))
    assert list(found) == [COLOCATED, ONE_PROCESS, PROCESSES]
    for name, (command, port) in found.items():
        words = command[command.index("epd") + 1 :] if "epd" in command else ["serve", *command[3:]]
        config = parse(words)
        serve = config.serve if isinstance(config, ClusterConfig) else config
        assert isinstance(serve, ServeConfig)
        assert (serve.http.port, serve.load_format, serve.engine.max_model_len) == (port, "dummy", 32_768), name
        if isinstance(config, ClusterConfig):
            assert {role: len(seats) for role, seats in config.seats.items()} == {"encode": 1, "prefill": 1, "decode": 1}
            assert {seat.device for seats in config.seats.values() for seat in seats} == {"cuda:0"}


def test_the_mix_is_text_and_up_to_eight_images() -> None:
    counts = [each.num_images for each in parse_mix(serving.Traffic().mix)]
    assert min(counts) == 0
    assert max(counts) == 8


def test_an_arrangement_that_does_not_come_up_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(
        setup: Setup, command: list[str], port: int, limit_s: float, measured: list[Measured], clusters: list[Any]
    ) -> None:
        if "cluster" in command:
            raise ServerFailed("no room")
        if "tools.gpu_check.colocated" in command:
            raise TimeoutError
        clusters.append(cluster(0, 3))
        measured.append(Measured(6.0, summary(1.0), None))
        raise TimeoutError  # amid the second load

    monkeypatch.setattr(serving, "_one", one)
    found = list(run(Setup(folder="here", seconds=30.0)))
    missing = {each.name: each.reason for each in found if isinstance(each, Missing)}
    assert missing == {
        f"serving: {COLOCATED}": "TimeoutError: not through after 10 s",
        f"serving: {ONE_PROCESS}": "TimeoutError: not through after 15 s",
        f"serving: {PROCESSES}": "ServerFailed: no room",
    }
    rows = [each for each in found if not isinstance(each, Missing)]
    assert len(rows) == 6
    assert rows[0]["name"] == "P to D in one process: KV bytes moved"


async def test_a_server_under_load_is_measured() -> None:
    """The one actor as a process, on the CPU, asked by the load generator as a process."""
    traffic = Traffic(
        rates=(4.0, 8.0),
        duration_s=1.5,
        warmup_s=0.1,
        mix="text:3,1x64x64:1",
        prompt_words="4-8",
        output_tokens="2-6",
        num_warm_up=2,
    )
    setup = Setup(folder=str(BUNDLED_MODEL), seconds=0.0, traffic=traffic, options=("--kv-mib", "32", "--embedding-mib", "8"))
    command, port = commands(setup)[COLOCATED]
    measured: list[Measured] = []
    clusters: list[Mapping[str, Any]] = []
    await _one(replace(setup, environment={"OMP_NUM_THREADS": "1"}), command, port, 120.0, measured, clusters)
    assert [one.rate for one in measured] == [4.0, 8.0]
    for one in measured:
        rows = load_rows(COLOCATED, one, None)
        assert one.summary["num_ok"] == one.summary["num_requests"] > 0, one.summary["failures"]
        times = {row["name"].rpartition(": ")[2]: row["value"] for row in rows[1:]}
        assert list(times) == ["TTFT p50", "TTFT p99", "ITL p50", "ITL p99"]
        assert times.pop("ITL p50") >= 0  # two tokens may come at once
        assert min(times.values()) > 0
        assert one.busy_share is None  # nobody said whose
    assert clusters[0]["model"] == "model"
