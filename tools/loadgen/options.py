"""The load generator's command line: text in, checked options and the workload out."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.loadgen.workload import WorkloadSpec, read_prompts

_DEFAULT_NUM_REQUESTS = 100
_EPILOG = """\
examples:
  8 users who ask one question after another, half of them about an image:
    python -m tools.loadgen --url http://127.0.0.1:8000/v1 --concurrency 8 --image-share 0.5
  20 requests/s for a minute, 1-3 images each, half of the images seen before, raw data kept:
    python -m tools.loadgen --url http://127.0.0.1:8000/v1 --rate 20 --duration 60 --image-share 1 \\
        --images-per-request 1-3 --image-repeat-share 0.5 --json run.json --requests run.jsonl

In an open loop (--rate) a request's times count from the moment it was due, so that a server that falls behind cannot hide its
queue. TTFT: to the first output. ITL: between two pieces of output. TPOT: per output token after the first. E2E: to the end.
Exit status: 0 every request succeeded or was refused with 429; 1 some failed; 2 wrong usage, or no server.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage exits with status 2, as argparse does."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.num_requests is None and args.duration is None:
        args.num_requests = _DEFAULT_NUM_REQUESTS
    if args.rate is None and args.concurrency is None:
        args.concurrency = 1
    return args


def workload(args: argparse.Namespace) -> WorkloadSpec:
    """What the options ask for; the model's name may still be missing.

    Raises:
        ValueError, OSError: the prompts file is not one, or cannot be read.
    """
    return WorkloadSpec(
        model=args.model,
        seed=args.seed,
        image_share=args.image_share,
        images_per_request=args.images_per_request,
        image_sizes=args.image_sizes,
        image_repeat_share=args.image_repeat_share,
        num_repeated_images=args.num_repeated_images,
        image_format=args.image_format,
        image_prompt=args.image_prompt,
        prompt_words=args.prompt_words,
        prefix_words=args.prefix_words,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        expect_length=args.expect_length,
        temperature=args.temperature,
        extra_body=args.extra_body,
        prompts=read_prompts(Path(args.prompts).read_text().splitlines()) if args.prompts else (),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.loadgen",
        description="Put load on an OpenAI-compatible server and measure what its users would see.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", required=True, help="the API's base, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="model name (default: the first that the server lists)")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="longest life of a request (default: 600)")
    _add_load(parser.add_argument_group("load"))
    _add_prompts(parser.add_argument_group("prompts, drawn offline; equal for equal --seed"))
    _add_answers(parser.add_argument_group("answers"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", default="", metavar="FILE", help="write the summary as JSON")
    output.add_argument("--requests", default="", metavar="FILE", help="write every request as a JSON line")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency", type=_count, metavar="N", help="closed loop: N users, one request at a time each (default: 1)"
    )
    kind.add_argument("--rate", type=_positive, metavar="R", help="open loop: R requests/s on average, with Poisson arrivals")
    group.add_argument(
        "--stagger", type=float, default=0.0, metavar="S", help="closed loop: user i comes i * S later (default: 0)"
    )
    group.add_argument("--num-requests", type=_count, metavar="N", help="stop after N requests (default: 100 without --duration)")
    group.add_argument("--duration", type=_positive, metavar="S", help="start no request after S seconds")
    group.add_argument("--warmup", type=int, default=0, metavar="N", help="requests sent before and not measured (default: 0)")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, prompts and images (default: 0)")


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-share", type=_share, default=0.0, metavar="P", help="share of requests with images, 0 to 1 (default: 0)"
    )
    group.add_argument(
        "--images-per-request", type=_range, default=(1, 1), metavar="A[-B]", help="images of such a request (default: 1)"
    )
    group.add_argument(
        "--image-sizes", type=_sizes, default=((64, 64),), metavar="WxH,...", help="one drawn per image (default: 64x64)"
    )
    group.add_argument(
        "--image-repeat-share",
        type=_share,
        default=0.0,
        metavar="P",
        help="share of images that come back, for cache hits (default: 0)",
    )
    group.add_argument("--num-repeated-images", type=_count, default=8, metavar="N", help="images that come back (default: 8)")
    group.add_argument("--image-format", choices=("png", "jpeg"), default="png", help="(default: png)")
    group.add_argument("--image-prompt", default="What is in this image?", metavar="TEXT", help="the question about images")
    group.add_argument(
        "--prompt-words", type=_range, default=(16, 64), metavar="A[-B]", help="words of a text prompt (default: 16-64)"
    )
    group.add_argument(
        "--prefix-words", type=int, default=0, metavar="N", help="words that all text prompts begin with (default: 0)"
    )
    group.add_argument(
        "--prompts",
        default="",
        metavar="FILE",
        help='JSON lines to ask instead: {"prompt": ..., "images": [data URL...], "expect": ...}',
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=_range, default=(32, 32), metavar="A[-B]", help="longest answer (default: 32)")
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask for answers of exactly that length; other lengths are failures"
    )
    group.add_argument("--expect-length", action="store_true", help="do not ask, and count other lengths as failures")
    group.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    group.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of every request")


# --- types of values ------------------------------------------------------------------------------------------------


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range like 1-4")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: a range goes upwards from at least 1")
    return low, high


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise argparse.ArgumentTypeError(f"{part!r} is not a size like 640x480")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)


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
