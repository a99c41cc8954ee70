"""Decode steps beside what the device needs to read as many bytes; how seldom it waits; what a step launches."""

from __future__ import annotations

import statistics
import time

import numpy as np

from epd.model.device.runner import DeviceTextRunner
from epd.step import SampleRequest, SequenceStep, StepPlan
from gpu.stream import Stream
from protocol.messages import RequestId, Sampling
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.counts import decode_weight_bytes, kv_token_bytes
from tools.gpu_check.figures.decode_loop import STEPS_IN_FLIGHT, DecodeLoad, Pace, run_decode
from tools.gpu_check.figures.launches import count_launches
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits, Missing

_BARS = {False: ">=0.75", True: ">=0.65"}  # by whether KV counts: one request reads weights, many read KV as well
KV_COUNTS_FROM = 8  # requests


def run(rig: Rig) -> Figures:
    limits = rig.known_limits()
    stream = rig.stream("decode")
    runner, first_s = _prepared(rig, stream)
    again, again_s = _prepared(rig, stream)
    again.close()
    sizes = sorted(runner.captured)
    note = f"for {len(sizes)} batch sizes up to {sizes[-1]}" if sizes else "there are no graphs"
    yield make_row("decode: ready to run", first_s, "s", note=f"kernels compiled or found compiled, graphs captured {note}")
    if sizes:
        yield make_row("graph capture", 1e3 * again_s / len(sizes), "ms", note=f"each, {note}: a second start, nothing compiled")
    for size, seconds in runner.timed.items():
        kept = min(seconds, key=seconds.__getitem__)
        yield make_row(
            f"decode graph, batch {size}: linear layers fused with what is beside them",
            1e3 * seconds["fused"],
            "ms",
            baseline=1e3 * seconds["separate"],
            note=f"no context; baseline: matrix products and kernels one by one; kept: {kept}",
        )
    for batch, context in rig.loads.decode:
        fitting = min(batch, len(rig.kv_blocks()) // rig.num_blocks_of(context))
        if not fitting:
            yield Missing(decode_name(batch, context), "the pool that fits this device does not hold one such context")
            continue
        load = DecodeLoad(fitting, context, min(rig.loads.decode_steps, context // 2))
        pace = run_decode(
            runner,
            stream,
            load,
            num_blocks=len(rig.kv_blocks()),
            block_size=rig.block_size,
            max_model_len=rig.loads.max_model_len,
            vocab_size=rig.config.text.vocab_size,
        )
        yield from pace_rows(rig, load, pace, limits)
    runner.close()


def launches(rig: Rig) -> Figures:
    """A part of its own, and a late one: a profiler may take the process with it."""
    stream = rig.stream("decode")
    runner, _ = _prepared(rig, stream)
    for batch, context in rig.loads.decode:
        if fitting := min(batch, len(rig.kv_blocks()) // rig.num_blocks_of(context)):
            yield from _launches(rig, runner, stream, DecodeLoad(fitting, context, 1))
    runner.close()


def _prepared(rig: Rig, stream: Stream) -> tuple[DeviceTextRunner, float]:
    """A runner, and how long it took to be ready."""
    runner, started = rig.runner(), time.perf_counter()
    stream.submit(runner.prepare).result()
    return runner, time.perf_counter() - started


def decode_name(batch: int, context: int) -> str:
    return f"decode step, batch {batch}, context {short(context)}"


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def step_bytes(rig: Rig, batch: int, mean_context: float) -> tuple[float, str]:
    """What a step reads, and what that is."""
    weights = decode_weight_bytes(rig.config, rig.dtype.itemsize)
    if batch < KV_COUNTS_FROM:
        return weights, f"{weights / 1e9:.2f} GB of weights (all but the embedding table); KV not counted"
    kv = batch * mean_context * kv_token_bytes(rig.config.text, rig.dtype.itemsize)
    return weights + kv, f"{weights / 1e9:.2f} GB of weights (all but the embedding table) + {kv / 1e9:.2f} GB of KV"


def pace_rows(rig: Rig, load: DecodeLoad, pace: Pace, limits: Limits) -> list[Row]:
    """From the time of a step to shares of the device's limits."""
    name = decode_name(load.batch, load.context)
    num_bytes, what = step_bytes(rig, load.batch, pace.mean_context)
    reached = num_bytes / pace.step_s
    share = reached / limits.read_bytes_per_s
    note = (
        f"{what}, only read; against what a copy reads + writes. That is {share:.0%} of what the device only reads "
        f"({limits.read_bytes_per_s / 1e9:,.0f} GB/s)"
    )
    bar = _BARS[load.batch >= KV_COUNTS_FROM]
    return [
        make_row(f"{name}: bytes read", reached / 1e9, "GB/s", baseline=limits.copy_bytes_per_s / 1e9, bar=bar, note=note),
        make_row(f"{name}: time", 1e3 * pace.step_s, "ms", note=f"median; {1e3 * pace.device_s:.3f} ms of it on the device"),
        make_row(
            f"{name}: device idle",
            100 * pace.idle_share,
            "%",
            note=f"of the time, between steps; {STEPS_IN_FLIGHT} in flight, scheduler and event loop included",
        ),
    ]


def _launches(rig: Rig, runner: DeviceTextRunner, stream: Stream, load: DecodeLoad) -> Figures:
    """Of a step of that size, whose graph has been captured; how long the host takes to hand one over."""
    name = decode_name(load.batch, load.context)
    plan = _plan(rig, load)

    def step() -> None:
        runner.execute(plan)

    handed_over = []
    for _ in range(rig.loads.rounds):
        stream.submit(rig.timer.synchronize).result()
        began = time.perf_counter()
        stream.submit(step).result()
        handed_over.append(time.perf_counter() - began)
    try:
        kernels, copies = stream.submit(count_launches, step, rig.device).result()
    except Exception as error:  # a profiler that may not look is no reason to end
        yield Missing(f"{name}: kernels", f"{type(error).__name__}: {error}")
        return
    layers = rig.config.text.num_layers
    yield make_row(f"{name}: kernels", kernels, "", note=f"{kernels / layers:.1f} a layer, and {copies} copies")
    wall = statistics.median(handed_over)
    yield make_row(
        f"{name}: alone", 1e3 * wall, "ms", note="one step handed to an idle device, from when it is handed over to its end"
    )


def _plan(rig: Rig, load: DecodeLoad) -> StepPlan:
    each = rig.num_blocks_of(load.context)
    tables = np.random.default_rng(1).permutation(load.batch * each).astype(np.int32).reshape(load.batch, each)
    nothing = np.empty(0, np.int32)
    return StepPlan(
        tuple(
            SequenceStep(
                request_id=RequestId(f"r{row}"),
                token_ids=np.ones(1, np.int32),
                num_computed_tokens=load.context - 1,
                positions=np.full((3, 1), load.context - 1, np.int32),
                block_table=table,
                sample=SampleRequest(Sampling(temperature=0.0), nothing, nothing),
            )
            for row, table in enumerate(tables)
        )
    )
