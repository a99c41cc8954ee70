"""`python -m tools.profile_device`: write the profile of a device that `epd serve --device emulated:PROFILE` can stand in for."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import msgspec

from epd.cluster.build import load
from epd.config import ServeConfig, parse
from epd.emulated.profile import Profile
from epd.errors import EpdError
from epd.model.config import load_model_config
from epd.model.loader import resolve_model
from epd.options import BUNDLED_MODEL
from tools.bench.machine import describe_machine
from tools.geometry import GEOMETRIES, name_of, write_geometry
from tools.profile_device.roofline import CHIPS, roofline


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.profile_device", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    real = kinds.add_parser("measure", help="from a device of this machine")
    real.add_argument("--device", default="cpu", help="as epd serve takes it")
    real.add_argument("--model", default=str(BUNDLED_MODEL), help=f"folder, hub id, or {' or '.join(GEOMETRIES)}: random weights")
    real.add_argument("--num-threads", type=int, default=1)
    real.add_argument("--best-of", type=int, default=1, metavar="N", help="measure so often, keep the quickest: for a busy host")
    real.add_argument("--output", type=Path, required=True)
    paper = kinds.add_parser("roofline", help="from data sheets; marked as such")
    paper.add_argument("--chip", choices=sorted(CHIPS), default="h200")
    paper.add_argument("--model", choices=list(GEOMETRIES), default="qwen3-vl-8b")
    paper.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        profile = _measure(args) if args.kind == "measure" else _compute(args)
    except EpdError as error:
        sys.exit(f"profile_device: {error.message}")
    args.output.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    print(f"wrote {args.output} ({profile.provenance}: {profile.source})")


def _compute(args: argparse.Namespace) -> Profile:
    return roofline(CHIPS[args.chip], load_model_config(write_geometry(args.model)), name_of(args.model))


def _measure(args: argparse.Namespace) -> Profile:
    from tools.profile_device.measure import measure

    is_random = args.model in GEOMETRIES
    words = ["serve", "--roles", "encode,prefill,decode", "--device", args.device, "--num-threads", str(args.num_threads)]
    words += ["--model", str(write_geometry(args.model)) if is_random else args.model]
    config = parse([*words, *(["--load-format", "dummy"] if is_random else [])])
    assert isinstance(config, ServeConfig)
    folder = resolve_model(config.model, weights=not is_random)
    parts = load(config, folder, load_model_config(folder), lambda text: print(f"  {text}", flush=True))
    try:
        machine = describe_machine()
        source = f"{machine['cpu']}, {args.num_threads} threads, torch {machine['packages']['torch']}, {datetime.date.today()}"
        fits = [measure(parts, device=args.device, source=source) for _ in range(max(1, args.best_of))]
    finally:
        parts.close()
    fit = min(fits, key=lambda each: sum(seconds for _, seconds in each.profile.text.rows))
    profile = fit.profile
    if len(fits) > 1:
        profile = msgspec.structs.replace(profile, source=f"{profile.source}, the quickest of {len(fits)} measurements")
    for name, predicted, measured in fit.checks:
        print(f"  {name}: predicted {1e3 * predicted:.2f} ms, measured {1e3 * measured:.2f} ms ({predicted / measured - 1:+.0%})")
    return profile


if __name__ == "__main__":
    main()
