"""What reading costs: the load generator with 10 to 2,000 streams of 10 tokens/s each, from a server that computes nothing.

The server is a process of its own. The generator's CPU time per token is what it would take from a server on the same host, and
its lag is how far it can be trusted.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from functools import partial

import uvloop
from tqdm import tqdm

from tools.bench.rows import Row, make_row
from tools.loadgen.client import Client, open_session
from tools.loadgen.lengths import Lengths
from tools.loadgen.load import Run, run_closed_loop
from tools.loadgen.stats import Window, summarise
from tools.loadgen.stream import OK
from tools.loadgen.workload import WorkloadSpec, draw_chat
from tools.servers import flood_command, free_port, running_server

_STREAMS = (10, 100, 1000, 2000)
_TOKENS_PER_S = 10.0
_NUM_TOKENS = 160
_RAMP_S = 8.0  # over which the streams begin: connecting costs much more than a token


def run() -> list[Row]:
    """Rows for each number of streams; takes a minute and a half."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    runs = uvloop.run(_measure_all())
    return [row for num_streams, measured in runs.items() for row in rows(num_streams, measured)]


def rows(num_streams: int, measured: Run) -> list[Row]:
    """Figures of the stretch in which all streams were open.

    Raises:
        RuntimeError: a stream was not read to its end.
    """
    bad = [record for record in measured.records if record.outcome != OK]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(measured.records)} streams failed: {bad[0].reason} {bad[0].detail}")
    begun_s = max(record.piece_times_s[0] for record in measured.records)
    summary = summarise(measured, Window(begun_s, min(record.end_s for record in measured.records)))
    where = f"load generator, {num_streams} streams"
    return [
        make_row(f"{where}: read", summary.output_tokens_per_s, "tokens/s", baseline=num_streams * _TOKENS_PER_S, bar=">=0.99"),
        make_row(f"{where}: CPU per token", summary.cpu_us_per_piece, "us"),
        make_row(f"{where}: event loop late, p50", 1e3 * summary.loop_lag.p50_s, "ms"),
        make_row(f"{where}: event loop late, p99", 1e3 * summary.loop_lag.p99_s, "ms", bar="<10"),
    ]


async def _measure_all() -> dict[int, Run]:
    port = free_port()
    command = flood_command(port, tokens_per_s=_TOKENS_PER_S, num_tokens=_NUM_TOKENS)
    async with (
        running_server(command, ready_url=f"http://127.0.0.1:{port}/v1/models", environment={}),
        open_session() as session,
    ):
        client = Client(session, f"http://127.0.0.1:{port}/v1", timeout_s=300.0, clock=time.perf_counter, keeps_text=False)
        return {num_streams: await _measure(client, num_streams) for num_streams in tqdm(_STREAMS, file=sys.stderr)}


async def _measure(client: Client, num_streams: int) -> Run:
    spec = WorkloadSpec(model="flood", prompt_words=Lengths(4, 4))
    measured = await run_closed_loop(
        client,
        partial(draw_chat, spec),
        concurrency=num_streams,
        num_chats=num_streams,
        stagger_s=_RAMP_S / num_streams,
    )
    await asyncio.sleep(0.2)  # the server's connections are all free again
    return measured


if __name__ == "__main__":
    from tools.bench.rows import render

    print(render(run()))
