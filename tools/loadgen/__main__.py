"""python -m tools.loadgen --url http://127.0.0.1:8000/v1: wires the options, the load and the report."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
from tqdm import tqdm

from tools.loadgen import report
from tools.loadgen.arrivals import poisson_arrivals
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import Run, run_closed_loop, run_open_loop
from tools.loadgen.options import parse, workload
from tools.loadgen.stats import Summary, summarise
from tools.loadgen.stream import OK, REFUSED, Record
from tools.loadgen.workload import WorkloadSpec, draw_request


def main(argv: Sequence[str] | None = None) -> int:
    """Run a load and print what came of it; answers the exit status."""
    args = parse(argv)
    try:
        spec = workload(args)
        run, model = _run(_measure(args, spec))
        summary = summarise(run.records, wall_s=run.wall_s, loop_lags_s=run.loop_lags_s)
        print(report.table(summary))
        for line in report.reasons(run.records):
            print(f"  {line}", file=sys.stderr)
        _write(args, model, run, summary)
    except (ValueError, OSError, aiohttp.ClientError) as error:  # a prompts file, an output file, no server
        print(f"loadgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loadgen: interrupted", file=sys.stderr)
        return 130
    return 0 if summary.num_failed == 0 and summary.num_requests else 1


async def _measure(args: argparse.Namespace, spec: WorkloadSpec) -> tuple[Run, str]:
    async with open_session(args.api_key) as session:
        client = Client(session, args.url, timeout_s=args.timeout, clock=time.perf_counter)
        spec = replace(spec, model=args.model or await client.first_model())
        if args.warmup:
            draw = partial(draw_request, replace(spec, seed=spec.seed + 1))
            num_users = min(args.concurrency or 8, args.warmup)
            await run_closed_loop(
                client, draw, concurrency=num_users, num_requests=args.warmup, duration_s=None, clock=time.perf_counter
            )
        with tqdm(total=args.num_requests, unit="req", disable=args.no_progress, file=sys.stderr, smoothing=0.05) as bar:
            return await _load(args, client, spec, bar), spec.model


async def _load(args: argparse.Namespace, client: Client, spec: WorkloadSpec, bar: tqdm) -> Run:
    counts = {"failed": 0, "refused": 0}

    def show(record: Record) -> None:
        counts["refused"] += record.outcome == REFUSED
        counts["failed"] += record.outcome not in (OK, REFUSED)
        if any(counts.values()):
            bar.set_postfix(counts, refresh=False)
        bar.update()

    draw = partial(draw_request, spec)
    if args.rate is not None:
        arrivals = poisson_arrivals(args.rate, seed=args.seed, num_requests=args.num_requests, duration_s=args.duration)
        return await run_open_loop(client, draw, arrivals, clock=time.perf_counter, progress=show)
    return await run_closed_loop(
        client,
        draw,
        concurrency=args.concurrency,
        num_requests=args.num_requests,
        duration_s=args.duration,
        clock=time.perf_counter,
        progress=show,
        stagger_s=args.stagger,
    )


def _write(args: argparse.Namespace, model: str, run: Run, summary: Summary) -> None:
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "api_key"} | {"model": model}
        Path(args.json).write_text(json.dumps(report.as_json(summary, settings), indent=2) + "\n")
    if args.requests:
        records = sorted(run.records, key=lambda record: record.index)
        start_s = min((record.scheduled_s for record in records), default=0.0)
        Path(args.requests).write_text("".join(json.dumps(report.request_line(record, start_s)) + "\n" for record in records))


def _run(main: Coroutine[None, None, tuple[Run, str]]) -> tuple[Run, str]:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.run(main)
    return uvloop.run(main)


if __name__ == "__main__":
    sys.exit(main())
