"""python -m tools.article.check_plan: what `epd.sizing` predicts beside what emulated devices did, for several services.

Of each service: its latencies at a share of its predicted capacity, under Poisson arrivals, and its rate under users enough to
fill it. Prediction and run come of the same profile, so that what is checked is the arithmetic, not the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from tqdm import tqdm

from epd.emulated.profile import Profile, load_profile
from epd.model.config import load_model_config
from epd.sizing.demand import Steps
from epd.sizing.predict import Model, Predictor, Split, capacity, with_sessions
from epd.sizing.render import provenance
from epd.sizing.workload import parse_workload
from tools.article.cell import cell
from tools.article.cluster import Running, Topology, beside_decode, disaggregated, running, strong, traditional
from tools.article.drive import drive
from tools.article.workloads import WORKLOADS, Promise, Workload
from tools.bench.machine import describe_machine, machine_slug
from tools.geometry import folder_of
from tools.loadgen.arrivals import Rate, arrival_times
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import Limits, run_open_loop
from tools.loadgen.stats import ttft_s
from tools.loadgen.stream import OK

LIMIT = 0.15
_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
_WARM_SHARE = 0.25  # of an open loop's time
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    workload: str
    topology: Topology
    split: Split | None = None  # None: every stage on every device


@dataclass(frozen=True, slots=True)
class Figure:
    """One predicted figure and the measured one. `is_checked`: it is held to the limit."""

    service: str
    name: str
    unit: str
    predicted: float
    measured: float
    is_checked: bool = True

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else math.inf


def _apart(workload: str, workers: str, split: Split) -> Case:
    return Case(workload, disaggregated(workers, workers), split)


def cases_of(profile: Profile) -> tuple[Case, ...]:
    return (
        _apart("text", "prefill:6,decode:2", Split(0, 6, 2)),
        _apart("1 image", "encode:3,prefill:4,decode:1", Split(3, 4, 1)),
        _apart("4 images", "encode:3,prefill:4,decode:1", Split(3, 4, 1)),
        _apart("8 images", "encode:2,prefill:5,decode:1", Split(2, 5, 1)),
        _apart("mixed", "encode:2,prefill:5,decode:1", Split(2, 5, 1)),
        Case("1 image", traditional(8)),
        Case("1 image", strong(8, profile)),
        _apart("1 image", "encode+prefill:7,decode:1", Split(0, 7, 1)),
        _apart("8 images", "encode+prefill:7,decode:1", Split(0, 7, 1)),
        Case("1 image", disaggregated("EPD 8", "encode+prefill+decode:8")),
        Case("8 images", disaggregated("EPD 8", "encode+prefill+decode:8")),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Answers 0 when every figure that is held to the limit is within it."""
    args = _parser().parse_args(argv)
    profile = load_profile(args.profile)
    cases = list(cases_of(profile))
    cases = [cases[int(number)] for number in args.cases.split(",")] if args.cases else cases
    figures, doubts = uvloop.run(_check(cases, profile, args))
    print(f"{provenance(profile)}\n")
    print(render(figures))
    for doubt in doubts:
        print(f"not to be trusted: {doubt}")
    machine = describe_machine()
    path = args.out or _RESULTS / f"{time.strftime('%Y-%m-%d')}-plan-{machine_slug(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(each), "error": each.error if math.isfinite(each.error) else None} for each in figures]
    kept = {"machine": machine, "profile": args.profile, "provenance": profile.provenance, "doubts": doubts, "figures": rows}
    path.write_text(json.dumps(kept, indent=2) + "\n")
    return 0 if all(abs(each.error) <= LIMIT for each in figures if each.is_checked) else 1


def render(figures: Sequence[Figure]) -> str:
    """A Markdown table."""
    lines = ["| service | figure | predicted | emulated | error |", "| --- | --- | --- | --- | --- |"]
    for each in figures:
        verdict = "" if not each.is_checked or abs(each.error) <= LIMIT else " (over)"
        error = f"{100 * each.error:+.1f} %{verdict}"
        lines.append(
            f"| {each.service} | {each.name} | {each.predicted:.4g} {each.unit} | {each.measured:.4g} {each.unit} | {error} |"
        )
    return "\n".join(lines)


def predictor(case: Case, profile: Profile) -> Predictor:
    image = load_model_config(folder_of(profile)).image
    assert image is not None
    asked = parse_workload(WORKLOADS[case.workload].notation(), image)
    if case.split is not None:
        return Model(profile, asked, Steps(2048, 256)).apart(case.split)
    devices, is_fused = len(case.topology.workers), case.topology.sharing == "fused"
    model = Model(profile, asked, Steps(beside_decode(profile) if is_fused else 1 << 30, 256))
    return model.together(devices, fused=is_fused) if case.topology.is_baseline else model.pooled(devices)


async def _check(cases: Sequence[Case], profile: Profile, args: argparse.Namespace) -> tuple[list[Figure], list[str]]:
    figures: list[Figure] = []
    doubts: list[str] = []
    for number, case in enumerate(tqdm(cases, file=sys.stderr)):
        predict = predictor(case, profile)
        most = capacity(predict)
        rate = args.load * most
        name = f"{case.topology.name}, {case.workload}"
        workload = WORKLOADS[case.workload]
        async with running(case.topology, model=folder_of(profile), profile=args.profile, slow=args.slow) as cluster:
            wanted = predict(rate)
            found = await _latencies(cluster, workload, rate, args, seed=2 * number)
            where = f"{name} at {rate:.3g} req/s"
            figures += [
                Figure(where, "TTFT, mean", "s", wanted.ttft_s, found[0]),
                Figure(where, "TTFT, p90", "s", wanted.ttft_p90_s, found[1], is_checked=False),
                Figure(where, "ITL, mean", "s", wanted.itl_s, found[2]),
            ]
            users = round(args.crowd * workload.sessions)
            measured = await _throughput(cluster, case, workload, users, args, seed=2 * number + 1)
            figures.append(Figure(f"{name}, {users} users", "rate", "req/s", with_sessions(predict, users).rate, measured))
            async with open_session() as session:
                doubts += [f"{where}: {doubt}" for doubt in (await cluster.describe(session))["doubts"]]
    return figures, doubts


async def _latencies(
    cluster: Running, workload: Workload, rate: float, args: argparse.Namespace, *, seed: int
) -> tuple[float, float, float]:
    """TTFT (mean and p90) and mean ITL, in device time, after a warm-up."""
    arrivals = arrival_times(Rate(rate / args.slow, rate / args.slow), seed=seed + 1, duration_s=args.seconds)
    async with open_session() as session:
        client = Client(session, f"{cluster.url}/v1", timeout_s=600.0, clock=time.perf_counter, keeps_text=False)
        run = await run_open_loop(client, partial(workload.chat, seed=seed), arrivals, limits=Limits(drain_s=_DRAIN_S))
    records = [
        each for each in run.records if each.outcome == OK and each.scheduled_s - run.start_s >= _WARM_SHARE * args.seconds
    ]
    times = [ttft_s(each) for each in records]
    gaps = np.concatenate([np.diff(np.asarray(each.piece_times_s)) for each in records])
    tokens = sum(each.output_tokens - 1 for each in records)
    return float(np.mean(times)) / args.slow, float(np.percentile(times, 90)) / args.slow, float(gaps.sum()) / tokens / args.slow


async def _throughput(
    cluster: Running, case: Case, workload: Workload, users: int, args: argparse.Namespace, *, seed: int
) -> float:
    seen: list[dict[str, Any]] = []
    async with open_session() as session:
        client = Client(session, f"{cluster.url}/v1", timeout_s=600.0, clock=time.perf_counter, keeps_text=False)

        async def look() -> None:
            seen.append(await cluster.describe(session))

        found = await drive(
            client,
            partial(workload.chat, seed=seed),
            users=users,
            ramp_s=args.seconds / 2,
            hold_s=args.seconds / 2,
            at_edges=look,
        )
        await asyncio.sleep(0.5)
    return cell(
        *(case.topology.name, case.workload, found, seen[0], seen[-1]),
        slow=args.slow,
        promise=Promise(),
        output_tokens=workload.output_tokens,
    ).requests_per_s


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.article.check_plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h200-qwen3-vl-8b", help="file or name")
    parser.add_argument("--load", type=float, default=0.6, help="share of the predicted capacity at which latencies are compared")
    parser.add_argument("--crowd", type=float, default=1.5, help="users, over each workload's number, that fill the service")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--slow", type=float, default=2.0, help="devices take so many times as long")
    parser.add_argument("--cases", default="", help="numbers, as in 0,2, in the order of the table; all by default")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/<date>-plan-<machine>.json)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
