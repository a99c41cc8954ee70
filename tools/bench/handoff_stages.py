"""What a handoff costs beside the bytes: the messages between a prefill and a decode worker, in two processes, and their stages.

Both are the product's own, with the bundled model. A prompt of one block is prefilled first, so that what is timed waits for no
computation: decode asks for the KV (`PullKV`), prefill computes the block's checksum, decode copies what the `KVChunk` names and
compares, releases the lease and hears the `Handoff`. How long that took, from the reservation of a block to the request's being
ready to run, decode tells by itself, in the span that it reports as "transfer".
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import msgspec
import numpy as np
import uvloop

from epd.clock import monotonic
from epd.cluster.build import load
from epd.config import ServeConfig, parse
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from epd.model.config import load_model_config
from epd.options import BUNDLED_MODEL
from epd.stage import StageActor
from protocol.messages import Address, Decode, Endpoint, Finished, Prefill, Prefilled, RequestId, Sampling, WorkerId
from tools.bench.rows import Row, make_row, render

NUM_HANDOFFS = 400
NUM_FIRST = 20  # that do not count
_PREFILL, _DECODE = WorkerId("prefill"), WorkerId("decode")
_TOKEN = "bench"
_PROMPT_TOKENS = 12  # with the token that is decoded they fill less than a block, so that none is ever found cached
_TIMEOUT_S = 60.0
_OPTIONS = ("--num-threads", "1", "--kv-mib", "16", "--max-model-len", "256")


class _Deaf(Actor):
    """The gateway's end of what decode tells."""

    async def receive(self, mail: Mail) -> None:
        pass


def run() -> list[Row]:
    """Measure; takes about 15 s."""
    rows = []
    for transfer, name, bar in (
        ("mapped", "fixed cost of a handoff", "<1"),
        ("socket", "fixed cost of a handoff, over TCP", ""),
    ):
        total_s, copy_s = _medians(transfer)
        note = f"median of {NUM_HANDOFFS}, a prompt of one 32 KiB block, less its memcpy"
        rows.append(make_row(name, 1e3 * (total_s - copy_s), "ms", bar=bar, note=note))
    return rows


def _medians(transfer: str) -> tuple[float, float]:
    """Of a handoff and of one memcpy of its block."""
    command = [sys.executable, "-m", "tools.bench.handoff_stages", "--serve", transfer]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            return uvloop.run(_measure(transfer, msgspec.convert(json.loads(process.stdout.readline()), Endpoint)))
        finally:
            process.stdin.close()
            process.wait(_TIMEOUT_S)


async def _measure(transfer: str, prefill: Endpoint) -> tuple[float, float]:
    async with _worker(_DECODE, transfer) as (system, decode, block_bytes):
        system.introduce(prefill)
        taken = [await _handoff(system, prefill, number) for number in range(NUM_FIRST + NUM_HANDOFFS)]
        (link,) = decode.links()
        if (link.rung, link.num_transfers, link.num_bytes) != (transfer, len(taken), len(taken) * block_bytes):
            raise RuntimeError(f"{len(taken)} handoffs of a block by {transfer} were measured, and these happened: {link}")
        return statistics.median(taken[NUM_FIRST:]), _memcpy_s(block_bytes)


async def _handoff(system: System, prefill: Endpoint, number: int) -> float:
    """Seconds from the reservation of a block to its request's first step."""
    request_id, sampling = RequestId(f"r{number}"), Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = np.random.default_rng(number).integers(0, 200, _PROMPT_TOKENS).astype("<i4").tobytes()
    asked = Prefill(request_id, 1, prompt, _PROMPT_TOKENS, (), sampling, _TIMEOUT_S)
    first = await system.ask(Address(_PREFILL, "prefill"), asked, timeout_s=_TIMEOUT_S)
    assert isinstance(first.message, Prefilled)
    gateway = Address(_DECODE, "tokens")
    wanted = Decode(request_id, 1, prompt, _PROMPT_TOKENS, (), sampling, _TIMEOUT_S, prefill, gateway)
    finished = cast("Finished", (await system.ask(Address(_DECODE, "decode"), wanted, timeout_s=_TIMEOUT_S)).message)
    (span,) = [span for span in finished.spans if span.name == "transfer"]
    return span.end_s - span.start_s


def _memcpy_s(num_bytes: int) -> float:
    here, there = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    taken = []
    for _ in range(NUM_HANDOFFS):
        began = time.perf_counter()
        ctypes.memmove(here.ctypes.data, there.ctypes.data, num_bytes)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@asynccontextmanager
async def _worker(worker: WorkerId, transfer: str) -> AsyncIterator[tuple[System, StageActor, int]]:
    """A stage as `epd serve` runs it, without a gateway: its system, its actor and the bytes of its blocks."""
    config = parse(["serve", "--roles", worker, "--transfer", transfer, *_OPTIONS])
    assert isinstance(config, ServeConfig)
    parts = load(config, BUNDLED_MODEL, load_model_config(BUNDLED_MODEL), lambda text: None)
    system = System(worker=worker, token=_TOKEN, unix=transfer != "socket")
    await system.start()
    try:
        await system.register("tokens", _Deaf())
        (stage,) = parts.actors(system, monotonic)
        await system.register(stage.role, stage)
        yield system, stage, parts.sizes.kv_block_bytes
    finally:
        await system.stop()
        parts.close()


async def _serve(transfer: str) -> None:
    """The other process: a prefill worker, until its input ends."""
    async with _worker(_PREFILL, transfer) as (system, _, _):
        print(json.dumps(msgspec.to_builtins(system.endpoint)), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        uvloop.run(_serve(sys.argv[-1]))
    else:
        print(render(run()))
