"""End to end: eight users at the HTTP endpoint, epd beside `transformers serve --continuous-batching`.

Both serve the same checkpoint (the geometry of Qwen3-0.6B, random weights, float32) on the same cores with the same number of
threads, are asked the same prompts for answers of the same lengths by the same client, and are warm. Users come one after
another and prompts and answers differ in length, so that requests join and leave a running batch at different times.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import replace
from functools import partial

from tqdm import tqdm

from tools.bench.checkpoint import qwen3_checkpoint
from tools.bench.rows import Row, make_row
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import run_closed_loop
from tools.loadgen.stats import Summary, summarise
from tools.loadgen.workload import WorkloadSpec, draw_chat
from tools.servers import epd_command, free_port, running_server, thread_environment, transformers_command

_NUM_USERS = 8
_NUM_REQUESTS = 24
_STAGGER_S = 0.7
_NUM_WARMUP = 2


def run() -> list[Row]:
    """Rows of the comparison; takes several minutes."""
    num_threads = min(2, len(os.sched_getaffinity(0)))
    model = str(qwen3_checkpoint())
    spec = WorkloadSpec(model=model, prompt_words=Lengths(10, 40), output_tokens=Lengths(16, 48), expect_length=True)
    epd, peer = asyncio.run(_compare(spec, num_threads))
    return rows(epd, peer, num_threads)


def rows(epd: Summary, peer: Summary, num_threads: int) -> list[Row]:
    """The table's rows from the two runs.

    Raises:
        RuntimeError: a request failed, so the two did not do the same work.
    """
    for name, summary in (("epd", epd), ("transformers serve", peer)):
        if summary.num_ok != summary.num_requests:
            raise RuntimeError(f"{name}: {summary.num_ok} of {summary.num_requests} requests succeeded: {summary.failures}")
    where = f"serve, {_NUM_USERS} streams"
    note = f"baseline: transformers serve --continuous-batching, same checkpoint, {num_threads} threads each"
    return [
        make_row(
            f"{where}: output", epd.output_tokens_per_s, "tokens/s", baseline=peer.output_tokens_per_s, bar=">=1.5", note=note
        ),
        make_row(f"{where}: p99 ITL", 1e3 * epd.itl.p99_s, "ms", baseline=1e3 * peer.itl.p99_s, bar="<1"),
        make_row(f"{where}: p50 ITL", 1e3 * epd.itl.p50_s, "ms", baseline=1e3 * peer.itl.p50_s),
        make_row(f"{where}: p50 TTFT", 1e3 * epd.ttft.p50_s, "ms", baseline=1e3 * peer.ttft.p50_s),
        make_row(f"{where}: p99 TTFT", 1e3 * epd.ttft.p99_s, "ms", baseline=1e3 * peer.ttft.p99_s),
    ]


async def _compare(spec: WorkloadSpec, num_threads: int) -> tuple[Summary, Summary]:
    environment = thread_environment(num_threads)
    port = free_port()
    options = ("--model", spec.model, "--served-model-name", spec.model, "--num-threads", str(num_threads))
    async with running_server(epd_command(port, *options), ready_url=f"http://127.0.0.1:{port}/ready", environment=environment):
        epd = await _measure("epd", port, spec)
    port = free_port()
    async with running_server(
        transformers_command(port, spec.model), ready_url=f"http://127.0.0.1:{port}/health", environment=environment
    ):
        peer = await _measure("transformers serve", port, spec)
    return epd, peer


async def _measure(name: str, port: int, spec: WorkloadSpec) -> Summary:
    async with open_session() as session:
        client = Client(session, f"http://127.0.0.1:{port}/v1", timeout_s=1200.0, clock=time.perf_counter)
        warmup = replace(spec, seed=1, output_tokens=Lengths(4, 4))
        await run_closed_loop(
            client,
            partial(draw_chat, warmup),
            concurrency=_NUM_WARMUP,
            num_chats=_NUM_WARMUP,
            clock=time.perf_counter,
        )
        with tqdm(total=_NUM_REQUESTS, desc=f"  {name}", unit="req", file=sys.stderr) as bar:
            run = await run_closed_loop(
                client,
                partial(draw_chat, spec),
                concurrency=_NUM_USERS,
                num_chats=_NUM_REQUESTS,
                clock=time.perf_counter,
                progress=lambda record: bar.update() and None,
                stagger_s=_STAGGER_S,
            )
    return summarise(run)
