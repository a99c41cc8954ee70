"""python -m tools.article: the article's experiment on emulated devices. Wires topologies, workloads, drive and report."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from tqdm import tqdm

from epd.emulated.profile import Profile, load_profile
from epd.errors import BadConfig, EpdError
from epd.model.config import load_model_config
from epd.sizing.demand import Steps
from epd.sizing.plan import Service, Targets, is_pooled, plan_devices
from epd.sizing.predict import Model
from epd.sizing.workload import parse_workload
from tools.article import report
from tools.article.cell import Cell, cell
from tools.article.cluster import Running, Topology, disaggregated, running, strong, traditional
from tools.article.drive import drive
from tools.article.workloads import WORKLOADS, Promise, Workload
from tools.bench.machine import describe_machine, machine_slug
from tools.geometry import folder_of
from tools.loadgen.client import Client, open_session
from tools.servers import ServerFailed

_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
_START_S = 6.0  # of a cluster, its end included
_RAMP_SHARE = 0.6  # of a cell's time
_IDLE_S = 20.0
_USUAL = ("text", "8 images", "mixed", "quiet 8 images", "quiet mixed", "long prompts")


@dataclass(frozen=True, slots=True)
class _Job:
    """One topology and the workloads it is put under, each with whether it is the one that was chosen for it."""

    topology: Topology
    workloads: tuple[tuple[Workload, bool], ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Answers 0 when all was measured and may be trusted, 1 when the host was too slow or requests failed, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "tools.article", *(sys.argv[1:] if argv is None else argv)])
    try:
        profile = load_profile(args.profile)
        workloads = [_named(name, args) for name in args.workloads.split(",")]
        jobs = plan_jobs(profile, workloads, args)
    except (BadConfig, KeyError, ValueError) as error:
        print(f"article: {error}", file=sys.stderr)
        return 2
    gc.freeze()
    try:
        results = uvloop.run(_measure_all(jobs, args))
    except ServerFailed as error:
        print(f"article: {error}", file=sys.stderr)
        return 2
    setting = report.Setting(profile, args.devices, args.slow, str(args.slo), args.output_tokens, command)
    print(report.markdown(setting, results))
    _keep(setting, results, args.out)
    return 1 if report.doubts(results) else 0


def plan_jobs(profile: Profile, workloads: Sequence[Workload], args: argparse.Namespace) -> list[_Job]:
    """Every topology once, with all of its workloads, so that clusters start as seldom as can be."""
    if args.devices < 1:
        raise ValueError(f"--devices {args.devices}: at least one")
    ratios = [tuple(int(number) for number in each.split(":")) for each in args.ratios.split(",") if each]
    for ratio in ratios:
        if len(ratio) != 3 or sum(ratio) != args.devices or min(ratio) < 1:
            raise ValueError(f"--ratios: {':'.join(map(str, ratio))} are not E:P:D of {args.devices} devices")
    every: list[Topology] = [traditional(args.devices), strong(args.devices, profile)] if not args.no_baselines else []
    every += [
        disaggregated(f"E:P:D {':'.join(map(str, ratio))}", "encode:{},prefill:{},decode:{}".format(*ratio)) for ratio in ratios
    ]
    under: dict[Topology, dict[Workload, bool]] = {topology: dict.fromkeys(workloads, False) for topology in every}
    for workload in workloads:
        for place, service in enumerate(planned(profile, workload, args.devices, args.slo)):
            under.setdefault(disaggregated(service.name, service.workers), {})[workload] = place == 0
    return [_Job(topology, tuple(marked.items())) for topology, marked in under.items()]


def planned(profile: Profile, workload: Workload, devices: int, promise: Promise) -> list[Service]:
    """What `epd plan` answers, and the best of the other kinds: every stage on every device, or decode apart."""
    image = load_model_config(folder_of(profile)).image
    assert image is not None
    asked = parse_workload(workload.notation(), image)
    ttft_s = max(promise.ttft_of(kind.name, kind.num_images) for kind in workload.kinds)
    plan = plan_devices(Model(profile, asked, Steps()), Targets(ttft_s, promise.tpot_s), devices)
    kinds = sorted((each for each in plan.others if each.workers), key=lambda each: each.highest, reverse=True)
    others = [each for each in kinds if is_pooled(each.workers) != is_pooled(plan.answer.workers)]
    return [plan.answer, *others[:1]]


async def _measure_all(jobs: Sequence[_Job], args: argparse.Namespace) -> list[report.Result]:
    num_cells = sum(len(job.workloads) for job in jobs)
    cell_s = max(args.least_cell_s, (args.budget - _START_S * len(jobs)) / num_cells)
    results: list[report.Result] = []
    folder = folder_of(load_profile(args.profile))
    with tqdm(total=num_cells, unit="cell", file=sys.stderr, disable=args.no_progress) as bar:
        for job in jobs:
            bar.set_description(f"{job.topology.name}: starting")
            async with running(job.topology, model=folder, profile=args.profile, slow=args.slow) as cluster:
                for number, (workload, is_auto) in enumerate(job.workloads):
                    bar.set_description(f"{job.topology.name}: {workload.name}")
                    measured = await _measure(cluster, job.topology, workload, cell_s, args, seed=number)
                    results.append(report.Result(measured, workload.sessions, job.topology.is_baseline, is_auto))
                    bar.update()
    order = {name: place for place, name in enumerate(args.workloads.split(","))}
    return sorted(results, key=lambda result: order[result.cell.workload])


async def _measure(
    cluster: Running, topology: Topology, workload: Workload, cell_s: float, args: argparse.Namespace, *, seed: int
) -> Cell:
    async with open_session() as session:
        client = Client(session, f"{cluster.url}/v1", timeout_s=3600.0, clock=time.perf_counter, keeps_text=False)
        seen: list[dict[str, Any]] = []

        async def look() -> None:
            seen.append(await cluster.describe(session))

        found = await drive(
            client,
            partial(workload.chat, seed=seed),
            users=workload.sessions,
            ramp_s=_RAMP_SHARE * cell_s,
            hold_s=(1 - _RAMP_SHARE) * cell_s,
            at_edges=look,
        )
        await _until_idle(cluster, session)
        return cell(
            topology.name,
            workload.name,
            found,
            seen[0],
            seen[-1],
            slow=args.slow,
            promise=workload.promise(args.slo),
            output_tokens=workload.output_tokens,
        )


async def _until_idle(cluster: Running, session: aiohttp.ClientSession) -> None:
    """What was cut off is not to be in the way of what comes next."""
    try:
        async with asyncio.timeout(_IDLE_S):
            while True:
                found = await cluster.describe(session)
                stages = [stage for worker in found["workers"] for stage in worker["stages"]]
                if not found["num_running"] and not any(stage["num_waiting"] + stage["num_running"] for stage in stages):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise ServerFailed("requests that were cut off did not end") from None


def _keep(setting: report.Setting, results: Sequence[report.Result], out: Path | None) -> None:
    machine = describe_machine()
    date = time.strftime("%Y-%m-%d")
    path = out or _RESULTS / f"{date}-article-{machine_slug(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_json(setting, results, machine=machine, date=date), indent=2, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(report.markdown(setting, results) + "\n")
    try:
        from tools.article.plots import draw
    except ImportError:
        print("\nno plots: they need matplotlib, pip install 'epd[report]'", file=sys.stderr)
    else:
        draw(setting, results, path.with_suffix(".svg"))
    print(f"\nkept in {path} with .md and .svg beside it", file=sys.stderr)


def _named(name: str, args: argparse.Namespace) -> Workload:
    if name not in WORKLOADS:
        raise ValueError(f"there is no workload {name!r}: {', '.join(WORKLOADS)}")
    found = WORKLOADS[name]
    return replace(found, output_tokens=args.output_tokens, sessions=args.users or found.sessions)


def _promise(text: str) -> Promise:
    """ttft=S,image=S,tpot=S"""
    words = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        promise = Promise(float(words.pop("ttft")), float(words.pop("image", "0")), float(words.pop("tpot")))
        if words:
            raise ValueError(f"unknown: {', '.join(words)}")
        return promise
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ttft=S,tpot=S and perhaps image=S") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.article",
        description="Equal numbers of emulated devices under equal load: colocated services beside stages apart.",
        epilog="Close everything else first: the run says by itself when the host was too slow to be believed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--profile", default="h200-qwen3-vl-8b", help="device profile: a file, or the name of one that comes along"
    )
    parser.add_argument("--devices", type=int, default=8, help="of each topology")
    parser.add_argument("--ratios", default="", help="E:P:D, as in 3:4:1, to be measured beside what `epd plan` chooses")
    parser.add_argument("--workloads", default=",".join(_USUAL), help=f"which ones of: {', '.join(WORKLOADS)}")
    parser.add_argument("--users", type=int, default=0, help="at once; 0: each workload's own number")
    parser.add_argument("--output-tokens", type=int, default=64, help="of an answer")
    parser.add_argument(
        "--slo", type=_promise, default=Promise(), metavar="ttft=S,image=S,tpot=S", help="what sessions are held to"
    )
    parser.add_argument("--slow", type=float, default=2.0, help="devices take so many times as long; results are divided by it")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for all of it")
    parser.add_argument("--least-cell-s", type=float, default=8.0, help="seconds for one topology under one workload, at least")
    parser.add_argument("--no-baselines", action="store_true", help="only epd")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/<date>-article-<machine>.json)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EpdError as error:
        print(f"article: {error.message}", file=sys.stderr)
        sys.exit(2)
