"""python -m tools.article.check_steps: do steps under load take what the profile says?

Some decode workers with the same number of streams each. The time between two tokens of a stream is that of one step, which the
profile's curves give for so many streams of that context; what is compared is the mean over all streams, on the client's clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import uvloop

from epd.emulated.cost import TextWork, text_s
from epd.emulated.profile import Profile, load_profile
from epd.sizing.render import provenance
from tools.article.check_plan import Figure, render
from tools.article.cluster import disaggregated, running
from tools.article.workloads import Kind, Workload
from tools.geometry import folder_of
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import run_closed_loop
from tools.loadgen.stream import OK, Record

LIMIT = 0.02
_SKIPPED = 20  # tokens at both ends of a stream, while others begin and end


def main(argv: Sequence[str] | None = None) -> int:
    """Answers 0 when all steps are within 2 % of the profile."""
    args = _parser().parse_args(argv)
    profile = load_profile(args.profile)
    figures, doubts = uvloop.run(_measure_all(profile, args))
    print(f"{provenance(profile)}\n\n{render(figures)}")
    for doubt in doubts:
        print(f"not to be trusted: {doubt}")
    return 0 if all(abs(each.error) <= LIMIT for each in figures) else 1


async def _measure_all(profile: Profile, args: argparse.Namespace) -> tuple[list[Figure], list[str]]:
    figures: list[Figure] = []
    doubts: list[str] = []
    topology = disaggregated("decode", f"prefill:1,decode:{args.workers}")
    async with (
        running(topology, model=folder_of(profile), profile=args.profile, slow=args.slow) as cluster,
        open_session() as session,
    ):
        for number, each in enumerate(int(word) for word in args.streams.split(",")):
            workload = Workload("steps", (Kind("steps", text_tokens=args.prompt_tokens),), each, args.output_tokens)
            client = Client(session, f"{cluster.url}/v1", timeout_s=600.0, clock=time.perf_counter, keeps_text=False)
            streams = each * args.workers
            run = await run_closed_loop(client, partial(workload.chat, seed=number), concurrency=streams, num_chats=streams)
            bad = [record for record in run.records if record.outcome != OK]
            if bad:
                raise RuntimeError(f"{len(bad)} of {streams} streams failed: {bad[0].reason} {bad[0].detail}")
            figures.append(figure(profile, run.records, each, args.prompt_tokens, args.slow))
        doubts += (await cluster.describe(session))["doubts"]
    return figures, doubts


def figure(profile: Profile, records: Sequence[Record], each: int, prompt_tokens: int, slow: float) -> Figure:
    """Of workers with `each` streams: a step by the profile, and by the stretch in which all streams were running."""
    times = [np.asarray(record.piece_times_s) for record in records]
    start = max(float(each_[0]) for each_ in times)
    end = min(float(each_[-1]) for each_ in times)
    gaps, contexts = [], []
    for stream in times:
        inside = np.flatnonzero((stream > start) & (stream < end))[_SKIPPED:-_SKIPPED]
        gaps.append((stream[inside[-1]] - stream[inside[0]]) / (len(inside) - 1))
        contexts.append(prompt_tokens + float(inside.mean()))
    step = text_s(profile, TextWork(each, 0, round(sum(contexts) / len(contexts) * each)))
    return Figure(f"{each} streams on each worker", "a step", "s", step, float(np.mean(gaps)) / slow)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.article.check_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="h200-qwen3-vl-8b", help="file or name")
    parser.add_argument("--workers", type=int, default=4, help="decode workers")
    parser.add_argument("--streams", default="1,8,32", help="on each worker, one number after another")
    parser.add_argument("--prompt-tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--output-tokens", type=int, default=1200, help="of each stream")
    parser.add_argument("--slow", type=float, default=1.0, help="devices take so many times as long")
    return parser


if __name__ == "__main__":
    sys.exit(main())
