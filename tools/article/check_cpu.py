"""python -m tools.article.check_cpu: a real server on this CPU beside one on the emulated device that stands for it, same load.

One process has all stages and one compute thread, and one user asks: server and load generator then have a core each, and no two
stages compute at once. With more, a real CPU's stages share caches and cores with everything else on the host, which a profile of
steps measured alone knows nothing of, and what is compared would be the host's scheduler. The profile is measured right before: a
shared host is not as fast at noon as it was in the morning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import uvloop

from epd.emulated.profile import load_profile
from epd.sizing.render import provenance
from tools.article.check_plan import LIMIT, Figure
from tools.bench.machine import describe_machine, machine_slug
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import run_closed_loop
from tools.loadgen.mix import parse_mix
from tools.loadgen.stats import Summary, summarise
from tools.loadgen.workload import WorkloadSpec, draw_chat
from tools.servers import epd_command, free_port, running_server, thread_environment

_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
_WARMUP = 4
_PROFILE_TIMEOUT_S = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """Answers 0 when throughput and median TTFT are within 15 % of each other."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        args.profile = args.profile or _measured_now(Path(folder) / "cpu.json")
        return _check(args)


def _measured_now(path: Path) -> str:
    """A profile of this CPU, as `epd serve` uses it with one thread."""
    words = ["measure", "--device", "cpu", "--num-threads", "1", "--best-of", "2", "--output", str(path)]
    environment = {**os.environ, **thread_environment(1)}
    subprocess.run(
        [sys.executable, "-m", "tools.profile_device", *words], env=environment, check=True, timeout=_PROFILE_TIMEOUT_S
    )
    return str(path)


def _check(args: argparse.Namespace) -> int:
    profile = load_profile(args.profile)
    spec = WorkloadSpec(
        model="tiny",
        mix=parse_mix(args.mix),
        prompt_words=Lengths(300, 600),
        output_tokens=Lengths(args.output_tokens, args.output_tokens),
        ignore_eos=True,
    )
    pairs = [uvloop.run(_both(args, spec)) for _ in range(args.rounds)]
    real, emulated = min(pairs, key=lambda pair: pair[0].ttft.p50_s)  # the round in which the host was left alone most
    figures = compare(real, emulated)
    print(
        f"{provenance(profile)}\n{args.users} users, {args.requests} requests of {args.mix}, {args.output_tokens} tokens each\n"
    )
    print("| figure | real CPU | emulated | emulated against real |\n| --- | --- | --- | --- |")
    for each in figures:
        print(f"| {each.name} | {each.measured:.4g} {each.unit} | {each.predicted:.4g} {each.unit} | {100 * each.error:+.1f} % |")
    machine = describe_machine()
    path = args.out or _RESULTS / f"{time.strftime('%Y-%m-%d')}-cpu-{machine_slug(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine, "profile": profile.source, "figures": [{**asdict(each), "error": each.error} for each in figures]}
    path.write_text(json.dumps(kept, indent=2) + "\n")
    return 0 if all(abs(each.error) <= LIMIT for each in figures if each.is_checked) else 1


def compare(real: Summary, emulated: Summary) -> list[Figure]:
    """The emulated figures as predictions of the real ones.

    Raises:
        RuntimeError: a request failed, so that the two did not do the same work.
    """
    for name, summary in (("real", real), ("emulated", emulated)):
        if summary.num_ok != summary.num_requests:
            raise RuntimeError(f"{name}: {summary.num_ok} of {summary.num_requests} requests succeeded: {summary.failures}")
    return [
        Figure("", "throughput", "req/s", emulated.requests_per_s, real.requests_per_s),
        Figure("", "TTFT, p50", "s", emulated.ttft.p50_s, real.ttft.p50_s),
        Figure("", "ITL, p50", "s", emulated.itl.p50_s, real.itl.p50_s, is_checked=False),
        Figure("", "E2E, p50", "s", emulated.e2e.p50_s, real.e2e.p50_s, is_checked=False),
    ]


async def _both(args: argparse.Namespace, spec: WorkloadSpec) -> tuple[Summary, Summary]:
    return await _measure(args, spec, "cpu"), await _measure(args, spec, f"emulated:{args.profile}")


async def _measure(args: argparse.Namespace, spec: WorkloadSpec, device: str) -> Summary:
    port = free_port()
    limits = ("--token-budget", "2048", "--max-chunk-tokens", "512", "--max-running", "64")
    command = epd_command(port, "--device", device, "--served-model-name", spec.model, *limits)
    async with (
        running_server(command, ready_url=f"http://127.0.0.1:{port}/ready", environment=thread_environment(1)),
        open_session() as session,
    ):
        client = Client(session, f"http://127.0.0.1:{port}/v1", timeout_s=300.0, clock=time.perf_counter)
        for seed, number in ((1, _WARMUP), (0, args.requests)):
            draw = partial(draw_chat, replace(spec, seed=seed))
            run = await run_closed_loop(client, draw, concurrency=args.users, num_chats=number)
    return summarise(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.article.check_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="", help="file or name (default: measured now)")
    parser.add_argument("--users", type=int, default=1, help="at once")
    parser.add_argument("--requests", type=int, default=60, help="in all")
    parser.add_argument("--mix", default="text:50,1x480p:50", help="of classes, as the load generator takes it")
    parser.add_argument("--output-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="of both; the one with the quicker real run counts")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/<date>-cpu-<machine>.json)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
