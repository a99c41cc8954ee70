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
from tools.loadgen.stream import OK
from tools.loadgen.workload import WorkloadSpec, draw_chat

STEP_S = 0.1
_POINTS = {2: (1000,), 8: (10, 100, 1000), 24: (1000,)}  # decode workers -> numbers of streams
_NUM_TOKENS = 120
_RAMP_S = 4.0
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
    """So many streams over so many workers. CPU seconds are those of the stretch in which all streams were open."""

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


def added(times: npt.NDArray[np.float64], phases: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By how much tokens came after the steps that drew them. `times`: of one stream, all from one worker, which is the one with
    the latest phase that its quickest token may have come of.
    """
    offsets = np.mod(times[:, None] - phases[None, :], STEP_S)  # [tokens, workers]
    # A worker's own tokens never come before their time; of the workers for which they all stay on one side, the nearest.
    best = int(np.argmin(np.percentile(offsets, 2, axis=0) + (np.ptp(offsets, axis=0) > 0.9 * STEP_S)))
    found: npt.NDArray[np.float64] = offsets[:, best]
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
        client = Client(session, f"{cluster.url}/v1", timeout_s=300.0, clock=time.monotonic, keeps_text=False)
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
        await asyncio.sleep(_RAMP_S + 2.0)
        before = await _look(cluster, session)
        await asyncio.sleep(_NUM_TOKENS * STEP_S - _RAMP_S - 3.0)
        after = await _look(cluster, session)
        measured = await task
    return _point(measured, before, after, streams, workers, cluster.started_s)


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
    phases = np.arange(1, workers + 1) * STEP_S / (workers + 1)
    found, tokens = [], 0
    for record in measured.records:
        times = np.asarray(record.piece_times_s)
        here = times[(times >= before.at_s) & (times <= after.at_s)]
        tokens += len(here)
        found.append(added(here, phases))
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
