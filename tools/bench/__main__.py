"""python -m tools.bench: runs every benchmark, each in its own process, prints one table and keeps it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.apart import run_apart
from tools.bench.machine import describe_machine, machine_slug
from tools.bench.rows import Row, meets_bar, render

BENCHMARKS = ("link", "handoff", "engine", "serve", "overhead", "streams", "gateway", "recovery")
_RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def main(argv: Sequence[str] | None = None, *, package: str = "tools.bench") -> int:
    """Answers 0 if all benchmarks ran, whether or not their bars were met; 1 if one broke."""
    args = _parser().parse_args(argv)
    machine = describe_machine()
    rows: list[Row] = []
    broken: dict[str, str] = {}
    for number, name in enumerate(args.names, start=1):
        print(f"[{number}/{len(args.names)}] {name}", file=sys.stderr, flush=True)
        started_s = time.perf_counter()
        found, error = run_apart(f"{package}.{name}")
        rows += found
        if error:
            broken[name] = error
            print(error, file=sys.stderr)
        print(f"[{number}/{len(args.names)}] {name}: {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
    print(render(rows))
    path = args.out or _RESULTS / f"{time.strftime('%Y-%m-%d')}-{machine_slug(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_result(machine, rows, broken), indent=2) + "\n")
    num_short = sum(meets_bar(row) is False for row in rows)
    print(f"\n{len(rows)} figures, {num_short} short of their bar, {len(broken)} benchmarks broken; kept in {path}")
    return 1 if broken else 0


def _result(machine: dict[str, Any], rows: list[Row], broken: dict[str, str]) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine,
        "rows": [{**row, "met": meets_bar(row)} for row in rows],
        "broken": broken,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Measure epd against what else could do the job, on this machine, in one run.",
        epilog="Close everything else first: on a busy machine the figures say nothing.",
    )
    parser.add_argument("names", nargs="*", default=BENCHMARKS, metavar="NAME", help=f"which ones: {', '.join(BENCHMARKS)} (all)")
    parser.add_argument("--out", type=Path, help="JSON file (bench/results/<date>-<machine>.json)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
