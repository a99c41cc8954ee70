"""The load generator's command line: text in, checked options, the workload and the loads out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tools.loadgen.arrivals import Rate, parse_rate
from tools.loadgen.campaign import Load
from tools.loadgen.knee import KneeSearch
from tools.loadgen.lengths import parse_lengths
from tools.loadgen.mix import TEXT_ONLY, parse_mix
from tools.loadgen.slo import parse_slo
from tools.loadgen.trace import read_trace
from tools.loadgen.workload import ONE_TURN, OUTPUT_TOKENS, PROMPT_WORDS, WorkloadSpec, read_prompts

_DEFAULT_NUM_REQUESTS = 100
_DEFAULT_PROBE_S = 30.0
_DEFAULT_PROBE_DRAIN_S = 60.0
_EPILOG = """\
examples:
  100 questions, one after another:
    python -m tools.loadgen --url http://127.0.0.1:8000/v1
  20 requests/s for a minute, the first 10 s not counted, half text, some of the images seen before, everything kept:
    python -m tools.loadgen --url http://127.0.0.1:8000/v1 --rate 20 --duration 60 --warmup 10s --slo ttft=1,itl=0.05 \\
        --mix text:50,1x1080p:30,4x720p:20 --image-reuse 0.3 --json run.json --requests run.jsonl --html run.html
  what the server does at several loads, and how much it can take:
    python -m tools.loadgen --url ... --sweep rate=1,2,4,8 --duration 30 --html sweep.html
    python -m tools.loadgen --url ... --find-knee --slo ttft=1,itl=0.05 --html knee.html

In an open loop (--rate, --trace) a request's times count from the moment it was due, so that a server that falls behind cannot
hide its queue. TTFT: to the first output. ITL: between two pieces of output. TPOT: per output token after the first.
E2E: to the end. Prompts are equal for equal --seed: a second run with it finds the server's caches warm.
Exit status: 0 every request succeeded or was refused with 429; 1 some failed; 2 wrong usage, or no server.
"""

T = TypeVar("T")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage exits with status 2, as argparse does."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.find_knee:
        if args.sweep or args.trace or args.concurrency:
            parser.error("--find-knee looks for a rate: it goes with neither --sweep, --trace nor --concurrency")
        if args.rate is not None and args.rate.start != args.rate.end:
            parser.error("--find-knee begins at one --rate, not at a ramp")
        args.rate = args.rate or Rate(1.0, 1.0)
        args.duration = args.duration or (None if args.num_requests else _DEFAULT_PROBE_S)
        args.drain = _DEFAULT_PROBE_DRAIN_S if args.drain is None else args.drain
    if args.trace and (args.rate or args.concurrency or args.sweep or args.prompts):
        parser.error("--trace says itself when what is asked: it goes with neither --rate, --concurrency, --sweep nor --prompts")
    if args.num_requests is None and args.duration is None and not args.trace:
        args.num_requests = _DEFAULT_NUM_REQUESTS
    if args.rate is None and args.concurrency is None:
        args.concurrency = 1
    if args.duration is not None and args.warmup[1] >= args.duration:
        parser.error("the warm-up takes all of the duration")
    return args


def workload(args: argparse.Namespace) -> WorkloadSpec:
    """What the options ask for; the model's name may still be missing.

    Raises:
        ValueError, OSError: the prompts file or the trace is not one, or cannot be read.
    """
    return WorkloadSpec(
        model=args.model,
        seed=args.seed,
        mix=args.mix,
        image_reuse=args.image_reuse,
        image_pool=args.image_pool,
        image_format=args.image_format,
        image_prompt=args.image_prompt,
        prompt_words=args.prompt_words,
        prefix_words=args.prefix_words,
        output_tokens=args.output_tokens,
        turns=args.turns,
        think_s=args.think_time,
        ignore_eos=args.ignore_eos,
        expect_length=args.expect_length,
        temperature=args.temperature,
        extra_body=args.extra_body,
        prompts=read_prompts(Path(args.prompts).read_text().splitlines()) if args.prompts else (),
        trace=read_trace(Path(args.trace).read_text().splitlines(), speed=args.trace_speed) if args.trace else (),
        words_per_token=args.words_per_token,
    )


def loads(args: argparse.Namespace) -> list[Load]:
    """The runs that the options ask for: one, or one per value of the sweep."""
    one = Load(
        rate=args.rate,
        burstiness=args.burstiness,
        concurrency=args.concurrency or 1,
        stagger_s=args.stagger,
        num_chats=args.num_requests,
        duration_s=args.duration,
        drain_s=args.drain,
        warmup_chats=args.warmup[0],
        warmup_s=args.warmup[1],
    )
    if not args.sweep:
        return [one]
    name, values = args.sweep
    if name == "rate":
        return [replace(one, rate=Rate(value, value)) for value in values]
    return [replace(one, rate=None, concurrency=int(value)) for value in values]


def knee_search(args: argparse.Namespace) -> KneeSearch | None:
    if not args.find_knee:
        return None
    return KneeSearch(args.rate.start, args.knee_goodput, args.knee_probes, args.knee_precision)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON; nothing secret."""
    plain = (int, float, str, bool, type(None))
    found = {name: value for name, value in vars(args).items() if name != "api_key"}
    found["mix"] = ",".join(f"{each.name}:{each.weight:g}" for each in args.mix)
    return {
        name: value if isinstance(value, plain) or name in ("extra_body", "warmup", "sweep") else str(value)
        for name, value in found.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.loadgen",
        usage="%(prog)s --url URL [options]",
        description="Put load on an OpenAI-compatible server and measure what its users would see.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", required=True, help="the API's base, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="model name (default: the first that the server lists)")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="longest life of a request (default: 600)")
    parser.add_argument("--seed", type=_whole, default=0, help="of arrivals, prompts and images (default: 0)")
    _add_load(parser.add_argument_group("load"))
    _add_series(parser.add_argument_group("several runs"))
    _add_prompts(parser.add_argument_group("prompts, drawn offline"))
    _add_answers(parser.add_argument_group("answers"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency", type=_count, metavar="N", help="closed loop: N users, one chat at a time each (default: 1)"
    )
    kind.add_argument("--rate", type=_of(parse_rate), metavar="R", help="open loop: R chats/s, or a ramp over the run like 1:20")
    group.add_argument(
        "--burstiness",
        type=_not_negative,
        default=1.0,
        metavar="B",
        help="of the open loop's gaps: 0 even, 1 Poisson (default), more in gamma-distributed bursts (deviation / mean)",
    )
    group.add_argument(
        "--trace",
        default="",
        metavar="FILE",
        help="replay Mooncake-style JSON lines: timestamp, input_length, output_length, hash_ids (equal ids share a prefix)",
    )
    group.add_argument("--trace-speed", type=_positive, default=1.0, metavar="X", help="replay it X times as fast (default: 1)")
    group.add_argument("--num-requests", type=_count, metavar="N", help="stop after N chats (default: 100 without --duration)")
    group.add_argument(
        "--duration", type=_positive, metavar="S", help="start nothing after S seconds; throughput is measured within"
    )
    group.add_argument(
        "--drain", type=_not_negative, metavar="S", help="then give what runs S seconds, and cut it off (default: wait)"
    )
    group.add_argument(
        "--warmup",
        type=_warmup,
        default=(0, 0.0),
        metavar="N|Ns",
        help="not counted: N chats sent before, or the first N seconds of the run, as in 10s (default: 0)",
    )
    group.add_argument(
        "--stagger", type=_not_negative, default=0.0, metavar="S", help="closed loop: user i comes i * S later (default: 0)"
    )
    group.add_argument("--turns", type=_of(parse_lengths), default=ONE_TURN, metavar="A[-B]", help="of a chat (default: 1)")
    group.add_argument(
        "--think-time", type=_not_negative, default=0.0, metavar="S", help="mean pause before a later turn (default: 0)"
    )


def _add_series(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sweep", type=_sweep, metavar="rate=A,B,...", help="one run for each rate, or concurrency=A,B,...")
    group.add_argument(
        "--slo",
        type=_of(parse_slo),
        metavar="ttft=S,...",
        help="what makes a request good, in seconds: ttft, e2e, tpot, itl (the 99th percentile of its own gaps)",
    )
    group.add_argument("--find-knee", action="store_true", help="search for the highest rate that holds, beginning at --rate")
    group.add_argument(
        "--knee-goodput", type=_share, default=0.9, metavar="P", help="share of good requests it must keep (default: 0.9)"
    )
    group.add_argument("--knee-probes", type=_count, default=12, metavar="N", help="runs it may take (default: 12)")
    group.add_argument("--knee-precision", type=_positive, default=0.05, metavar="P", help="of the rate (default: 0.05)")
    group.add_argument(
        "--knee-time", type=_positive, default=1800.0, metavar="S", help="no probe starts after it (default: 1800)"
    )


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mix",
        type=_of(parse_mix),
        default=TEXT_ONLY,
        metavar="CLASS:WEIGHT,...",
        help="text, or images as in 1x1080p and 4x640x480 (default: text)",
    )
    group.add_argument("--image-reuse", type=_share, default=0.0, metavar="P", help="share of images that come back (default: 0)")
    group.add_argument("--image-pool", type=_count, default=8, metavar="N", help="images that come back, per size (default: 8)")
    group.add_argument("--image-format", choices=("jpeg", "png"), default="jpeg", help="(default: jpeg)")
    group.add_argument("--image-prompt", default="What is in this image?", metavar="TEXT", help="the question about images")
    group.add_argument(
        "--prompt-words",
        type=_of(parse_lengths),
        default=PROMPT_WORDS,
        metavar="LENGTH",
        help="of a text prompt: 32, 16-64, or lognormal:MEAN:SIGMA[:MAX] (default: 16-64)",
    )
    group.add_argument(
        "--prefix-words", type=_whole, default=0, metavar="N", help="that all text prompts begin with (default: 0)"
    )
    group.add_argument(
        "--words-per-token",
        type=_positive,
        default=1.0,
        metavar="X",
        help="of a trace's prompts: how many words make its tokens (default: 1, as with large vocabularies)",
    )
    group.add_argument(
        "--prompts",
        default="",
        metavar="FILE",
        help='JSON lines to ask instead: {"prompt": ..., "images": [data URL...], "expect": ...}',
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output-tokens",
        type=_of(parse_lengths),
        default=OUTPUT_TOKENS,
        metavar="LENGTH",
        help="longest answer: 32, 16-64, or lognormal:MEAN:SIGMA[:MAX] (default: 32)",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask for answers of exactly that length; other lengths are failures"
    )
    group.add_argument("--expect-length", action="store_true", help="do not ask, and count other lengths as failures")
    group.add_argument("--temperature", type=_not_negative, default=0.0, help="(default: 0)")
    group.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of every request")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", default="", metavar="FILE", help="write the summary as JSON")
    group.add_argument("--requests", default="", metavar="FILE", help="write every request as a JSON line")
    group.add_argument(
        "--html", default="", metavar="FILE", help="write the report with its plots (needs matplotlib: pip install epd[report])"
    )
    group.add_argument("--events", default="", metavar="FILE|URL", help="what happened to the server, to be marked in the report")
    group.add_argument(
        "--timeline-share",
        type=_share,
        metavar="P",
        help="of the requests, ask epd where their time went (default: 0.2 with --html, --requests or --json; else 0)",
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


# --- types of values ------------------------------------------------------------------------------------------------


def _of(read: Callable[[str], T]) -> Callable[[str], T]:
    """A reader whose ValueError says what is wrong, as argparse shows it."""

    def shown(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return shown


def _sweep(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    if name not in ("rate", "concurrency"):
        raise argparse.ArgumentTypeError(f"{text!r} is no sweep like rate=1,2,4 or concurrency=1,8,64")
    read: Callable[[str], float] = _positive if name == "rate" else _count
    return name, tuple(read(value) for value in values.split(","))


def _warmup(text: str) -> tuple[int, float]:
    """(chats before the run, seconds at its start)"""
    return (0, _not_negative(text[:-1])) if text.endswith("s") else (_whole(text), 0.0)


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
