"""python -m tools.loadgen --url http://127.0.0.1:8000/v1: wires the options, the runs and the reports."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shlex
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from tools.bench.machine import describe_machine
from tools.loadgen import dump, options, terminal
from tools.loadgen.campaign import Harness, Measured, find_knee, sweep
from tools.loadgen.client import Client, open_session
from tools.loadgen.events import Event, load_events
from tools.loadgen.knee import KneeSearch
from tools.loadgen.stream import OK, REFUSED, Record
from tools.loadgen.workload import WorkloadSpec

_TIMELINE_SHARE = 0.2


@dataclass(slots=True)
class _Results:
    model: str = ""
    runs: list[Measured] = field(default_factory=list)
    knee: KneeSearch | None = None
    events: tuple[Event, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loads and print what came of them; answers the exit status."""
    args = options.parse(argv)
    command = shlex.join(["python", "-m", "tools.loadgen", *(sys.argv[1:] if argv is None else argv)])
    try:
        if args.html:
            _need_matplotlib()
        spec = options.workload(args)
        results = _run(_measure(args, spec))
        for run in results.runs:
            for line in terminal.reasons(run.run.records):
                print(f"  {run.label}: {line}", file=sys.stderr)
        _print(args, results)
        _write(args, results, command)
    except (ValueError, OSError, aiohttp.ClientError) as error:  # a file to read or to write, no server
        print(f"loadgen: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loadgen: interrupted", file=sys.stderr)
        return 130
    if results.knee is not None:
        return 0 if results.knee.knee is not None else 1
    return 0 if all(run.summary.num_requests and not run.summary.num_failed for run in results.runs) else 1


async def _measure(args: argparse.Namespace, spec: WorkloadSpec) -> _Results:
    results = _Results(knee=options.knee_search(args))
    keeps_timelines = bool(args.html or args.requests or args.json)
    share = args.timeline_share if args.timeline_share is not None else _TIMELINE_SHARE * keeps_timelines
    async with open_session(args.api_key) as session:
        client = Client(
            session,
            args.url,
            timeout_s=args.timeout,
            clock=time.perf_counter,
            keeps_text=bool(args.requests),
            timeline_share=share,
        )
        results.model = args.model or await client.first_model()
        progress = _Progress(is_shown=not args.no_progress)
        harness = Harness(client, replace(spec, model=results.model), args.slo, begins=progress.begin, progress=progress.take)
        loads = options.loads(args)
        series: AsyncIterator[Measured]
        if results.knee is not None:
            series = find_knee(harness, loads[0], results.knee, max_s=args.knee_time)
        else:
            series = sweep(harness, loads)
        try:
            async for measured in series:
                results.runs.append(measured)
                progress.end()
        finally:
            progress.end()
        if args.events:
            results.events = await load_events(args.events, session)
    return results


class _Progress:
    """A bar for the run that is on."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._bar: tqdm | None = None
        self._counts = {"failed": 0, "refused": 0}

    def begin(self, label: str, num_chats: int | None) -> None:
        self._counts = dict.fromkeys(self._counts, 0)
        self._bar = tqdm(
            total=num_chats, desc=label, unit="req", disable=not self._is_shown, file=sys.stderr, smoothing=0.05, leave=False
        )

    def take(self, record: Record) -> None:
        if self._bar is None:
            return
        self._counts["refused"] += record.outcome == REFUSED
        self._counts["failed"] += record.outcome not in (OK, REFUSED)
        if any(self._counts.values()):
            self._bar.set_postfix(self._counts, refresh=False)
        self._bar.update()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _print(args: argparse.Namespace, results: _Results) -> None:
    if len(results.runs) == 1 and results.knee is None:
        print(terminal.table(results.runs[0].summary, args.slo))
        return
    print(terminal.comparison(results.runs))
    if results.knee is not None:
        print(terminal.knee_line(results.knee))
    for run in results.runs:
        if run.summary.warnings:
            print("\n".join(terminal.warning([f"{run.label}: {reason}" for reason in run.summary.warnings])))


def _write(args: argparse.Namespace, results: _Results, command: str) -> None:
    settings = options.settings(args) | {"model": results.model}
    if args.api_key:
        command = command.replace(args.api_key, "***")
    provenance: dict[str, Any] = {
        "tool": "epd tools.loadgen",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "machine": describe_machine(),
    }
    if args.json:
        summary = dump.summary_json(
            results.runs, settings=settings, provenance=provenance, knee=results.knee, events=results.events
        )
        Path(args.json).write_text(json.dumps(summary, indent=2) + "\n")
    if args.requests:
        dump.write_requests(Path(args.requests), results.runs, args.slo)
    if args.html:
        from tools.loadgen.page import report  # needs matplotlib, which is an extra

        page = report(
            results.runs, settings=settings, provenance=provenance, slo=args.slo, knee=results.knee, events=results.events
        )
        Path(args.html).write_text(page)


def _prepare() -> None:
    """What thousands of streams need: no thread that draws holds the loop up for long, no collector looks at all objects again
    and again, and every connection has a file."""
    sys.setswitchinterval(0.0005)
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    try:
        import resource
    except ImportError:  # not on every platform
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _need_matplotlib() -> None:
    """Before the load, not after it."""
    try:
        import matplotlib  # noqa: F401 - is it there?
    except ImportError:
        raise ValueError("--html needs matplotlib: pip install 'epd[report]'") from None


def _run(main: Coroutine[None, None, _Results]) -> _Results:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.run(main)
    return uvloop.run(main)


if __name__ == "__main__":
    _prepare()
    sys.exit(main())
