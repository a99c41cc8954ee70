"""What a token costs on its way: 10 to 1,000 streams of 10 tokens/s each, from emulated decode workers through a real gateway.

Steps of the emulated devices take 100 ms and end at moments that are known, each worker's at another one, so that every token is
due at a time that a client on the same host can tell. What it comes later by is what links, gateway, HTTP and the client add. CPU
time is that of the processes while all streams were open.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import uvloop
from tqdm import tqdm

from epd.emulated.profile import CopyCosts, Model, Profile, TextCosts, VisionCosts
from tools.article.cluster import Running, Topology, running
from tools.bench.rows import Row, make_row
from tools.geometry import qwen3_vl_8b
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import Run, run_closed_loop
from tools.loadgen.stream import OK, Record
from tools.loadgen.workload import WorkloadSpec, draw_chat

STEP_S = 0.1
_POINTS = {2: (1000,), 8: (10, 100, 1000), 24: (1000,)}  # decode workers -> numbers of streams
_NUM_TOKENS = 160
_RAMP_S = 4.0  # over which the streams begin
_SETTLE_S = 4.0
_PROFILE = Profile(
    device="a device with steps of 100 ms",
    provenance="roofline",
    source="made for this benchmark",
    memory_bytes=64 << 30,
    model=Model("any", kv_token_bytes=100_000, embedding_row_bytes=8192, weight_bytes=1 << 30, vision_weight_bytes=1 << 20),
    text=TextCosts(rows=((1, STEP_S), (1e6, STEP_S)), pair_s=0.0, context_s=0.0),
    vision=VisionCosts(patches=((1, 0.001), (1e6, 1.0)), pair_s=0.0, preprocess=((0, 0.0), (1e6, 1.0))),
    copies=CopyCosts(latency_s=0.0, bytes_per_s=1e12),
)


@dataclass(frozen=True, slots=True)
class Point:
    """So many streams over so many decode workers. CPU seconds are those of the stretch in which all streams were open."""

    streams: int
    workers: int
    added_s: npt.NDArray[np.float64]  # of each token
    tokens: int
    seconds: float
    gateway_cpu_s: float
    workers_cpu_s: float
    client_cpu_s: float
    late_share: float
    started_s: float


def run() -> list[Row]:
    """Rows for each point; takes about two minutes."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    return rows(uvloop.run(_measure_all(_POINTS)))


def rows(points: Sequence[Point]) -> list[Row]:
    found: list[Row] = []
    for point in points:
        where = f"gateway, {point.streams} streams, {point.workers} workers"
        p50, p99 = np.percentile(point.added_s, (50, 99))
        expected = point.streams / STEP_S
        found += [
            make_row(f"{where}: output", point.tokens / point.seconds, "tokens/s", baseline=expected, bar=">=0.98"),
            make_row(f"{where}: added to a token, p50", 1e3 * float(p50), "ms"),
            make_row(f"{where}: added to a token, p99", 1e3 * float(p99), "ms"),
            make_row(f"{where}: CPU per token, gateway", 1e6 * point.gateway_cpu_s / point.tokens, "us"),
            make_row(f"{where}: CPU per token, workers", 1e6 * point.workers_cpu_s / point.tokens, "us"),
            make_row(f"{where}: CPU per token, load generator", 1e6 * point.client_cpu_s / point.tokens, "us"),
            make_row(f"{where}: devices late by", 100 * point.late_share, "%", bar="<2"),
            make_row(f"{where}: start of the cluster", point.started_s, "s"),
        ]
    return found


def added(times: npt.NDArray[np.float64], phase_s: float) -> npt.NDArray[np.float64]:
    """By how much a stream's tokens came after the steps that drew them.

    Args:
        times: when they came, one every step. The quickest of them took less than a step.
        phase_s: steps of its worker end so long after multiples of a step.
    """
    since = times - STEP_S * np.arange(len(times))  # as if all had come of one step
    due = phase_s + np.floor((since.min() - phase_s) / STEP_S) * STEP_S
    found: npt.NDArray[np.float64] = since - due
    return found


async def _measure_all(points: dict[int, tuple[int, ...]]) -> list[Point]:
    found: list[Point] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=sum(map(len, points.values())), file=sys.stderr) as bar:
        profile = Path(folder) / "profile.json"
        profile.write_bytes(msgspec.json.encode(_PROFILE))
        for workers, numbers in points.items():
            topology = Topology("streams", ("prefill", *("decode",) * workers), options=("--token-budget", "65536"))
            options = ("--max-running", "2048")
            async with running(topology, model=qwen3_vl_8b(), profile=str(profile), beat_s=STEP_S, options=options) as cluster:
                for streams in numbers:
                    found.append(await _measure(cluster, streams, workers))
                    bar.update()
    return found


async def _measure(cluster: Running, streams: int, workers: int) -> Point:
    spec = WorkloadSpec(
        model="emulated",
        seed=streams,
        prompt_words=Lengths(4, 4),
        output_tokens=Lengths(_NUM_TOKENS, _NUM_TOKENS),
        ignore_eos=True,
    )
    async with open_session() as session:
        client = Client(session, f"{cluster.url}/v1", timeout_s=300.0, clock=time.monotonic, keeps_text=False, timeline_share=1.0)
        task = asyncio.create_task(
            run_closed_loop(
                client,
                partial(draw_chat, spec),
                concurrency=streams,
                num_chats=streams,
                clock=time.monotonic,
                stagger_s=_RAMP_S / streams,
            )
        )
        await asyncio.sleep(_RAMP_S + _SETTLE_S)
        before = await _look(cluster, session)
        await asyncio.sleep(_NUM_TOKENS * STEP_S - _RAMP_S - _SETTLE_S - 1.0)  # until just before the first of them ends
        after = await _look(cluster, session)
        measured = await task
    return _point(measured, before, after, streams, workers, cluster.started_s)


def _phase_s(record: Record, workers: int) -> float:
    """Of the decode worker that the stream came from, by the server's own account; the prefill worker has the number 0."""
    worker = next(span["worker"] for span in record.spans if span["stage"] == "decode")
    return int(worker.rpartition("-")[2]) * STEP_S / (workers + 1)


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    cpu_s: tuple[float, ...]  # gateway, all workers, this process
    busy_s: float
    late_s: float


async def _look(cluster: Running, session: aiohttp.ClientSession) -> _Look:
    described: dict[str, Any] = await cluster.describe(session)
    times = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in cluster.pids]
    processes = [worker["process"] for worker in described["workers"]]
    return _Look(
        time.monotonic(),
        (times[0], sum(times[1:]), time.process_time()),
        sum(each["device_busy_s"] for each in processes),
        sum(each["device_late_s"] for each in processes),
    )


def _point(measured: Run, before: _Look, after: _Look, streams: int, workers: int, started_s: float) -> Point:
    """Raises RuntimeError when a stream was not read to its end."""
    bad = [record for record in measured.records if record.outcome != OK]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(measured.records)} streams failed: {bad[0].reason} {bad[0].detail}")
    found, tokens = [], 0
    for record in measured.records:
        times = np.asarray(record.piece_times_s)[1:]  # the first token is prefill's
        here = (times >= before.at_s) & (times <= after.at_s)
        tokens += int(here.sum())
        if len(times) == _NUM_TOKENS - 1:  # else two came as one, and which are which is not known
            found.append(added(times, _phase_s(record, workers))[here])
    gateway, all_workers, client = (late - early for early, late in zip(before.cpu_s, after.cpu_s, strict=True))
    busy = after.busy_s - before.busy_s
    return Point(
        streams=streams,
        workers=workers,
        added_s=np.concatenate(found),
        tokens=tokens,
        seconds=after.at_s - before.at_s,
        gateway_cpu_s=gateway,
        workers_cpu_s=all_workers,
        client_cpu_s=client,
        late_share=(after.late_s - before.late_s) / busy if busy else 0.0,
        started_s=started_s,
    )


if __name__ == "__main__":
    from tools.bench.rows import render

    print(render(run()))
