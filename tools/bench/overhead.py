"""What serving adds: time per token at the endpoint against the bare model step, with the bundled model.

The bare step is `TextModelRunner.execute` on as many sequences as there are streams, each with the context that the streams have
on average, in a process that does nothing else. The endpoint's figure is TPOT: it also pays for HTTP, detokenization, the
messages between the actors, the prefills of requests that arrive meanwhile, and the client, all on the same cores.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from epd.model.config import load_model_config
from epd.model.runner import TextModelRunner
from epd.model.weights import load_text_weights
from epd.options import BUNDLED_MODEL
from epd.step import SampleRequest, SequenceStep, StepPlan
from gpu.backend import open_backend
from gpu.kernels.compiler import warm_up
from gpu.pool import PoolSpec
from protocol.messages import RequestId, Sampling
from tools.bench.rows import Row, make_row
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import run_closed_loop
from tools.loadgen.stats import Summary, summarise
from tools.loadgen.workload import WorkloadSpec, draw_chat
from tools.servers import epd_command, free_port, running_server, thread_environment

_STREAMS = (1, 32)
_MAX_TOKENS = 128
_REQUESTS_PER_STREAM = {1: 12, 32: 4}
_NUM_STEPS = 200
_BLOCK_SIZE = 16


def run() -> list[Row]:
    """Rows for each number of streams; takes about a minute."""
    summaries = asyncio.run(_measure_endpoint())
    return [row for num_streams, summary in summaries.items() for row in rows(num_streams, summary)]


def rows(num_streams: int, summary: Summary) -> list[Row]:
    """Measures the bare step for what the streams did and compares.

    Raises:
        RuntimeError: a request failed.
    """
    if summary.num_ok != summary.num_requests:
        raise RuntimeError(f"{summary.num_ok} of {summary.num_requests} requests succeeded: {summary.failures}")
    context_len = summary.input_tokens // summary.num_ok + _MAX_TOKENS // 2
    step_s = bare_step_s(num_streams, context_len)
    where = f"overhead, {num_streams} stream{'s' if num_streams > 1 else ''}"
    note = f"baseline: model step of batch {num_streams} alone, context {context_len}, bundled model, 1 thread"
    per_token_s = 1.0 / summary.output_tokens_per_s
    return [
        make_row(f"{where}: time per token of a stream", 1e3 * summary.tpot.p50_s, "ms", baseline=1e3 * step_s, note=note),
        make_row(f"{where}: time per token of all", 1e3 * per_token_s, "ms", baseline=1e3 * step_s / num_streams),
    ]


def bare_step_s(num_sequences: int, context_len: int) -> float:
    """Median seconds of one decode step of `num_sequences` sequences with `context_len` tokens each, greedy."""
    config = load_model_config(BUNDLED_MODEL)
    backend = open_backend("cpu")
    blocks_each = -(-(context_len + 1) // _BLOCK_SIZE)
    block_bytes = 4 * int(np.prod(config.kv_block_shape(_BLOCK_SIZE)))
    pool = backend.allocate_pool(PoolSpec(num_sequences * blocks_each, block_bytes, "kv", config.kv_layout(_BLOCK_SIZE)))
    warm_up()
    runner = TextModelRunner(config, load_text_weights(config, BUNDLED_MODEL), backend, pool, _BLOCK_SIZE, 1)
    plan = StepPlan(tuple(_sequence(index, context_len, blocks_each) for index in range(num_sequences)))
    try:
        for _ in range(20):
            runner.execute(plan)
        return statistics.median(runner.execute(plan).elapsed_s for _ in range(_NUM_STEPS))
    finally:
        runner.close()
        pool.close()
        backend.close()


def _sequence(index: int, context_len: int, blocks_each: int) -> SequenceStep:
    return SequenceStep(
        request_id=RequestId(str(index)),
        token_ids=np.array([index + 5], np.int32),
        num_computed_tokens=context_len,
        positions=np.full((3, 1), context_len, np.int32),
        block_table=np.arange(index * blocks_each, (index + 1) * blocks_each, dtype=np.int32),
        sample=SampleRequest(Sampling(temperature=0.0), np.empty(0, np.int32), np.empty(0, np.int32)),
    )


async def _measure_endpoint() -> dict[int, Summary]:
    port = free_port()
    command = epd_command(port, "--num-threads", "1")
    async with (
        running_server(command, ready_url=f"http://127.0.0.1:{port}/ready", environment=thread_environment(1)),
        open_session() as session,
    ):
        client = Client(session, f"http://127.0.0.1:{port}/v1", timeout_s=300.0, clock=time.perf_counter)
        model = await client.first_model()
        return {num_streams: await _measure(client, model, num_streams) for num_streams in _STREAMS}


async def _measure(client: Client, model: str, num_streams: int) -> Summary:
    spec = WorkloadSpec(model=model, prompt_words=Lengths(4, 8), output_tokens=Lengths(_MAX_TOKENS, _MAX_TOKENS), ignore_eos=True)
    num_requests = num_streams * _REQUESTS_PER_STREAM[num_streams]
    for is_warm in (False, True):
        draw = partial(draw_chat, replace(spec, seed=num_streams + 100 * is_warm))
        count = num_requests if is_warm else num_streams
        with tqdm(total=count, desc=f"  {num_streams} streams", unit="req", file=sys.stderr, disable=not is_warm) as bar:
            run = await run_closed_loop(
                client,
                draw,
                concurrency=num_streams,
                num_chats=count,
                clock=time.perf_counter,
                progress=lambda record, bar=bar: bar.update() and None,  # type: ignore[misc]  # mypy infers no lambda with defaults
            )
    return summarise(run)
