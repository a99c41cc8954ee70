"""EPD beside one actor that does all, on the same device under the same load: three servers, one after the other.

Each is started, warmed up and asked by tools.loadgen as a process of its own; NVML is asked meanwhile how busy the device is.
Random weights, so answers say nothing and are of the length that is asked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from gpu.utilisation import DeviceMeter
from tools.bench.rows import Row, make_row
from tools.gpu_check.found import Missing
from tools.servers import ServerFailed, free_port, running_server

COLOCATED = "one actor that does all"
ONE_PROCESS = "three stages in one process"
PROCESSES = "three processes"
SLO = "ttft=1,itl=0.05"
_SAMPLE_S = 0.1
_SETTLE_S = 20.0  # for the last requests of a load, and for a server to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """`rates`: requests per second, each for `duration_s`."""

    rates: tuple[float, ...] = (6.0, 16.0)
    duration_s: float = 7.0
    warmup_s: float = 1.0
    mix: str = "text:60,1x720p:20,4x480p:12,8x360p:8"
    prompt_words: str = "32-192"
    output_tokens: str = "32-96"
    num_warm_up: int = 16


@dataclass(kw_only=True)
class Setup:
    """`folder`: a model without weights. `options`: what every server is started with besides."""

    folder: str
    seconds: float
    device_uuid: str = ""
    traffic: Traffic = field(default_factory=Traffic)
    options: Sequence[str] = ("--device", "cuda", "--load-format", "dummy", "--max-model-len", "32768")
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One server under one load; `summary` as tools.loadgen writes it."""

    rate: float
    summary: Mapping[str, Any]
    busy_share: float | None


def commands(setup: Setup) -> dict[str, tuple[list[str], int]]:
    """By arrangement: what starts it, and the port it will listen on. What the others are held against comes first."""
    model = ["--model", setup.folder, "--served-model-name", "model", "--log-level", "warning", "--max-requests", "1024"]
    cluster = ["--encode", "1", "--prefill", "1", "--decode", "1"]
    found: dict[str, tuple[list[str], int]] = {}
    for name, words in (
        (COLOCATED, ["-m", "tools.gpu_check.colocated"]),
        (ONE_PROCESS, ["-m", "epd", "serve", "--cluster-port", "0"]),
        (PROCESSES, ["-m", "epd", "cluster", *cluster]),
    ):
        port = free_port()
        found[name] = ([sys.executable, *words, "--port", str(port), *model, *setup.options], port)
    return found


def run(setup: Setup) -> Iterator[Row | Missing]:
    """An arrangement that does not come up says why; what has no time left says so."""
    started = time.monotonic()
    known: dict[str, list[Measured]] = {}
    arrangements = commands(setup)
    for number, (name, (command, port)) in enumerate(arrangements.items()):
        left = setup.seconds - (time.monotonic() - started)
        share_s = left / (len(arrangements) - number)
        measured: list[Measured] = []
        clusters: list[Mapping[str, Any]] = []
        try:
            asyncio.run(_one(setup, command, port, share_s, measured, clusters))
        except (ServerFailed, TimeoutError, OSError, RuntimeError, ValueError, aiohttp.ClientError) as error:
            yield Missing(
                f"serving: {name}", f"{type(error).__name__}: {str(error)[-600:] or f'not through after {share_s:.0f} s'}"
            )
        if name == ONE_PROCESS and clusters:
            yield moved_row(clusters[0])
        if not measured:
            continue
        known[name] = measured
        if name != COLOCATED:
            for one in measured:
                beside = next((each for each in known.get(COLOCATED, []) if each.rate == one.rate), None)
                yield from load_rows(name, one, beside)
    if set(known) == {COLOCATED}:
        for one in known[COLOCATED]:
            yield from load_rows(COLOCATED, one, None)


def load_rows(name: str, one: Measured, beside: Measured | None) -> list[Row]:
    """Times in ms. The baseline is the one actor's figure under the same load."""
    where = f"serving at {one.rate:g}/s, {name}"
    summary, other = one.summary, beside.summary if beside else {}
    note = f"{summary['num_ok']} of {summary['num_requests']} requests succeeded"
    if beside:
        note += f"; baseline: {COLOCATED}, {other['num_ok']} of {other['num_requests']}"
    rows = [
        make_row(
            f"{where}: requests that meet TTFT 1 s, ITL 50 ms",
            summary["goodput_per_s"],
            "req/s",
            baseline=other.get("goodput_per_s"),
            note=note,
        )
    ]
    for title, key in (("TTFT", "ttft"), ("ITL", "itl")):
        for percentile in ("p50", "p99"):
            baseline = 1e3 * other[key][f"{percentile}_s"] if beside else None
            value = 1e3 * summary[key][f"{percentile}_s"]
            rows.append(make_row(f"{where}: {title} {percentile}", value, "ms", baseline=baseline))
    if one.busy_share is not None:
        baseline = 100 * beside.busy_share if beside and beside.busy_share is not None else None
        rows.append(make_row(f"{where}: GPU busy", 100 * one.busy_share, "%", baseline=baseline, note="NVML, over the load"))
    return rows


def moved_row(cluster: Mapping[str, Any]) -> Row | Missing:
    """What all links have moved, of a server of one process that has been asked for text alone: it counts itself."""
    links = [link for worker in cluster["workers"] for link in worker["links"]]
    name = "P to D in one process: KV bytes moved"
    num_transfers = sum(link["num_transfers"] for link in links)
    if not num_transfers:
        return Missing(name, "the server counted no handoff")
    num_bytes = sum(link["num_bytes"] for link in links)
    return make_row(name, float(num_bytes), "bytes", bar="<=0", note=f"{num_transfers} handoffs, as the server counted them")


# --- one server -----------------------------------------------------------------------------------------------------


async def _one(
    setup: Setup,
    command: Sequence[str],
    port: int,
    limit_s: float,
    measured: list[Measured],
    clusters: list[Mapping[str, Any]],
) -> None:
    """Fills `measured`, and `clusters` with what the server says of itself after it was asked for text: as far as time allows."""
    base = f"http://127.0.0.1:{port}"
    until = time.monotonic() + limit_s
    async with asyncio.timeout(limit_s):
        starting_s = max(10.0, limit_s - _SETTLE_S)
        async with running_server(command, ready_url=f"{base}/ready", environment=setup.environment, timeout_s=starting_s):
            traffic, warm_up = setup.traffic, ["--concurrency", "8", "--num-requests", str(setup.traffic.num_warm_up)]
            await _load(base, replace(traffic, mix="text"), [*warm_up, "--seed", "7"])
            clusters.append(await _cluster(base))  # nothing has moved so far but KV
            await _load(base, traffic, [*warm_up, "--seed", "8"])
            for rate in traffic.rates:
                if measured and until - time.monotonic() < 2 * traffic.duration_s + 5:
                    break  # what there is is worth more than what would be cut off
                words = ["--rate", str(rate), "--duration", str(traffic.duration_s), "--warmup", f"{traffic.warmup_s}s"]
                async with _busy(setup.device_uuid) as shares:
                    summary = await _load(base, traffic, [*words, "--seed", "0", "--drain", str(traffic.duration_s)])
                measured.append(Measured(rate, summary, sum(shares) / len(shares) if shares else None))


async def _cluster(base: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/cluster") as response:
        found: dict[str, Any] = await response.json()
        return found


async def _load(base: str, traffic: Traffic, words: Sequence[str]) -> Mapping[str, Any]:
    """One run of tools.loadgen; raises RuntimeError when it has nothing to say."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tools.loadgen", "--url", f"{base}/v1", "--json", file.name, "--no-progress"),
            *("--mix", traffic.mix, "--prompt-words", traffic.prompt_words, "--output-tokens", traffic.output_tokens),
            *("--ignore-eos", "--slo", SLO, "--timeline-share", "0"),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        text = await asyncio.to_thread(Path(file.name).read_text)
    if not text:
        raise RuntimeError(f"the load generator ended with status {process.returncode}: {errors.decode(errors='replace')[-500:]}")
    summary: Mapping[str, Any] = json.loads(text)["runs"][-1]["summary"]
    if not summary["num_ok"]:
        raise RuntimeError(f"no request succeeded: {summary['failures'] or summary['refusals']}")
    return summary


@asynccontextmanager
async def _busy(uuid: str) -> AsyncIterator[list[float]]:
    """What the driver says of the device again and again: the share of time in which anything ran on it."""
    shares: list[float] = []
    meter = await asyncio.to_thread(_open_meter, uuid)
    if meter is None:
        yield shares
        return

    async def sample() -> None:
        while True:
            usage = await asyncio.to_thread(meter.read)
            if usage.utilisation is not None:
                shares.append(usage.utilisation)
            await asyncio.sleep(_SAMPLE_S)

    task = asyncio.create_task(sample(), name="nvml")
    try:
        yield shares
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        meter.close()


def _open_meter(uuid: str) -> DeviceMeter | None:
    if not uuid:
        return None
    try:
        import pynvml

        from gpu.cuda.nvml import NvmlMeter

        pynvml.nvmlInit()
        return NvmlMeter(pynvml, uuid)
    except Exception:  # the library is not installed, or the driver does not let us: there is no such figure then
        return None
