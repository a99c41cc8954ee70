"""How soon requests go on when a worker dies, hangs or is drained, and whether their tokens are those that would have come.

Emulated H200s (roofline), real gateway, links and processes. A signal goes to one worker in the midst of a load; by the server's
own account of each request it is known which ones had to be placed anew, and when. All texts are held against those of the same
load left in peace, which is given to the workers that are left: before, it would have put all prompts into their caches.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import uvloop
from tqdm import tqdm

from tools.article.cluster import Running, Topology, running
from tools.bench.rows import Row, make_row
from tools.geometry import qwen3_vl_8b
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import Run, run_closed_loop
from tools.loadgen.mix import parse_mix
from tools.loadgen.stream import OK, Record
from tools.loadgen.workload import WorkloadSpec, draw_chat

_PROFILE = "h200-qwen3-vl-8b"
_REDISPATCHED = "<1000"  # ms
_DECODING = WorkloadSpec(
    model="emulated",
    prompt_words=Lengths(200, 200),
    output_tokens=Lengths(500, 500),
    ignore_eos=True,
    extra_body={"seed": 1},  # what emulated devices answer depends on it
)
_PREFILLING = replace(_DECODING, prompt_words=Lengths(2000, 2000), output_tokens=Lengths(4, 4))
_ENCODING = replace(_PREFILLING, mix=parse_mix("1x1080p"))
_STAGGER_S = 0.02


@dataclass(frozen=True, slots=True)
class Scenario:
    """`victim`: the worker, by its place among `workers`. `bar`: of the milliseconds until its requests have another."""

    name: str
    workers: tuple[str, ...]
    victim: int
    number: signal.Signals
    load: WorkloadSpec
    streams: int
    after_s: float  # from the first request
    bar: str = _REDISPATCHED


_DECODERS = ("prefill", "decode", "decode", "decode")
_PREFILLERS = ("prefill", "prefill", "decode")
_ENCODERS = ("encode", "encode", "prefill", "decode")
SCENARIOS = (
    Scenario("decode worker killed", _DECODERS, 2, signal.SIGKILL, _DECODING, 24, 2.5),
    # Four heartbeats of half a second have to be missed.
    Scenario("decode worker hangs", _DECODERS, 2, signal.SIGSTOP, _DECODING, 24, 2.5, bar="<3000"),
    Scenario("decode worker drained", _DECODERS, 2, signal.SIGTERM, _DECODING, 24, 2.5),
    Scenario("prefill worker killed", _PREFILLERS, 0, signal.SIGKILL, _PREFILLING, 24, 1.0),
    Scenario("prefill worker hangs", _PREFILLERS, 0, signal.SIGSTOP, _PREFILLING, 24, 1.0, bar="<3000"),
    Scenario("encode worker killed", _ENCODERS, 0, signal.SIGKILL, _ENCODING, 24, 0.7),
    Scenario("encode worker hangs", _ENCODERS, 0, signal.SIGSTOP, _ENCODING, 24, 0.7, bar="<3000"),
)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Of the requests that the worker had, in seconds from the signal on."""

    placed_s: tuple[float, ...]  # until another worker was chosen
    next_s: tuple[float, ...]  # until the next token came
    num_requests: int  # all of them
    num_altered: int  # whose text is not what it would have been


def run() -> list[Row]:
    """Rows for each scenario; takes two minutes."""
    return uvloop.run(_measure_all(SCENARIOS))


def rows(scenario: Scenario, found: Recovery) -> list[Row]:
    note = f"{len(found.placed_s)} of {found.num_requests} requests"
    made = [make_row(f"{scenario.name}: placed anew, last", 1e3 * max(found.placed_s), "ms", bar=scenario.bar, note=note)]
    if scenario.workers[scenario.victim] == "decode":  # else most of the time is the prompt's, and of those before it
        made += [
            make_row(f"{scenario.name}: next token, p50", 1e3 * float(np.median(found.next_s)), "ms"),
            make_row(f"{scenario.name}: next token, last", 1e3 * max(found.next_s), "ms"),
        ]
    return [*made, make_row(f"{scenario.name}: texts altered", found.num_altered, "", bar="<1")]


def recovery(undisturbed: Sequence[Record], records: Sequence[Record], signalled_s: float) -> Recovery:
    """What became of the requests that were placed more than once.

    Raises:
        RuntimeError: a request failed, or the worker had none.
    """
    if bad := [record for record in (*undisturbed, *records) if record.outcome != OK]:
        raise RuntimeError(f"{len(bad)} requests failed: {bad[0].reason} {bad[0].detail}")
    placed_s, next_s = [], []
    for record in records:
        if (since_sent_s := _placed_anew(record)) is not None:
            at_s = record.sent_s + since_sent_s
            placed_s.append(at_s - signalled_s)
            next_s.append(min(came_s for came_s in record.piece_times_s if came_s > at_s) - signalled_s)
    if not placed_s:
        raise RuntimeError("the worker had no requests")
    expected = {record.index: record.text for record in undisturbed}
    return Recovery(
        placed_s=tuple(placed_s),
        next_s=tuple(next_s),
        num_requests=len(records),
        num_altered=sum(record.text != expected[record.index] for record in records),
    )


def _placed_anew(record: Record) -> float | None:
    """When the last worker was chosen in place of another, or began with an image that another one had; since it was sent."""
    placements = [float(span["end_s"]) for span in record.spans if span["name"] == "placement"]
    if len(placements) > 1:
        return placements[-1]
    lost_s = [span["end_s"] for span in record.spans if span["stage"] == "encode" and span["name"].startswith("failed")]
    begun_s = [span["start_s"] for span in record.spans if span["stage"] == "encode" and not span["name"].startswith("failed")]
    return min(begin_s for begin_s in begun_s if begin_s >= max(lost_s)) if lost_s else None


async def _measure_all(scenarios: Sequence[Scenario]) -> list[Row]:
    found: list[Row] = []
    for scenario in tqdm(scenarios, file=sys.stderr):
        topology = Topology(scenario.name, scenario.workers, options=("--token-budget", "2048"))
        async with running(topology, model=qwen3_vl_8b(), profile=_PROFILE) as cluster:
            task = asyncio.create_task(_load(scenario, cluster))
            await asyncio.sleep(scenario.after_s)
            pid = cluster.pids[1 + scenario.victim]
            os.kill(pid, scenario.number)
            signalled_s = time.monotonic()
            measured = await task
            if scenario.number is signal.SIGSTOP:
                os.kill(pid, signal.SIGKILL)
            undisturbed = await _load(scenario, cluster)
        found += rows(scenario, recovery(undisturbed.records, measured.records, signalled_s))
    return found


async def _load(scenario: Scenario, cluster: Running) -> Run:
    async with open_session() as session:
        client = Client(session, f"{cluster.url}/v1", timeout_s=120.0, clock=time.monotonic, timeline_share=1.0)
        return await run_closed_loop(
            client,
            partial(draw_chat, scenario.load),
            concurrency=scenario.streams,
            num_chats=scenario.streams,
            clock=time.monotonic,
            stagger_s=_STAGGER_S,
        )


if __name__ == "__main__":
    from tools.bench.rows import render

    print(render(run()))
