"""Prompts through the stage's own runner.

One of thousands of tokens, as the server cuts it, whole, and by either attention. Many short ones in one step, their attention in
one launch and one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from epd.model.device.graphs import GraphOptions
from epd.step import SampleRequest, SequenceStep, StepPlan, TextRunner
from gpu.cuda.kernels import Chunks, Kernels
from gpu.stream import Stream
from protocol.messages import RequestId, Sampling
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.attention import WAYS, chunk_sizes
from tools.gpu_check.figures.counts import prefill_flop
from tools.gpu_check.figures.decode import short
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits, Missing

_ROUNDS = 3


def run(rig: Rig) -> Figures:
    limits = rig.known_limits()
    yield from _by(rig, rig.backend.kernels, limits, "")
    yield _short_prompts(rig, limits)
    for name, choose in rig.sets.items():
        if name not in WAYS or name == rig.backend.kernels.name:
            continue
        try:
            yield from _by(rig, cast(Kernels, _OtherChunks(rig.backend.kernels, choose())), limits, f", {WAYS[name]}")
        except Exception as error:  # such a set is not here, or does not work here
            yield Missing(f"prefill, {short(rig.loads.prefill_tokens)} tokens: {name}", f"{type(error).__name__}: {error}")


def _by(rig: Rig, kernels: Kernels, limits: Limits, way: str) -> Figures:
    """`way`: of attention, where it is another than the server's."""
    num_tokens, stream = rig.loads.prefill_tokens, rig.stream("prefill")
    runner = rig.runner(kernels, graphs=GraphOptions(max_batch=0))
    stream.submit(runner.prepare).result()
    for chunk in chunk_sizes(rig):
        seconds = _seconds(_plans(rig, chunk), runner, stream)
        reached = prefill_flop(rig.config.text, num_tokens) / seconds
        is_whole = chunk >= num_tokens
        yield make_row(
            f"prefill, {short(num_tokens)} tokens, {'in one chunk' if is_whole else f'chunks of {short(chunk)}'}{way}",
            reached / 1e12,
            "TFLOP/s",
            baseline=limits.flop_per_s / 1e12,
            bar="" if way else ">=0.55",
            note=f"{1e3 * seconds:.1f} ms, {num_tokens / seconds:,.0f} tokens/s"
            + ("" if is_whole else "; as the server cuts one prompt"),
        )
    runner.close()


def _short_prompts(rig: Rig, limits: Limits) -> Row:
    num_prompts, num_tokens = rig.loads.short_prompts
    plans = [StepPlan(tuple(_short_prompt(rig, number, num_tokens) for number in range(num_prompts)))]
    seconds, own = [], rig.backend.kernels
    for kernels in (own, cast(Kernels, _OtherChunks(own, own))):
        runner, stream = rig.runner(kernels, graphs=GraphOptions(max_batch=0)), rig.stream("prefill")
        stream.submit(runner.prepare).result()
        seconds.append(_seconds(plans, runner, stream))
        runner.close()
    together, one_by_one = seconds
    reached = num_prompts * prefill_flop(rig.config.text, num_tokens) / together
    return make_row(
        f"prefill, {num_prompts} prompts of {num_tokens} tokens in a step",
        reached / 1e12,
        "TFLOP/s",
        baseline=limits.flop_per_s / 1e12,
        note=f"{1e3 * together:.1f} ms; with a launch of attention for each prompt {1e3 * one_by_one:.1f} ms",
    )


class _OtherChunks:
    """A set of kernels, but a launch of attention for each chunk, by `chunks`: so nothing else is different."""

    def __init__(self, kernels: Kernels, chunks: Kernels) -> None:
        self.name = f"{kernels.name}, each chunk by {chunks.name}"
        self._kernels, self._chunks = kernels, chunks

    def varlen_chunk_attention(self, q: Tensor, kv_pool: Tensor, layer: int, chunks: Chunks, scale: float, out: Tensor) -> None:
        for queries, block_table, context_len, attended in chunks.one_by_one(q, out):
            self._chunks.chunk_attention(queries, kv_pool, layer, block_table, context_len, scale, attended)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


def _seconds(plans: Sequence[StepPlan], runner: TextRunner, stream: Stream) -> float:
    """From handing over the first step to what the last one drew; steps follow each other without a wait."""
    durations = []
    for turn in range(_ROUNDS + 1):
        started = time.perf_counter()
        futures = [stream.submit(runner.execute, plan) for plan in plans]
        for future in futures:
            future.result()
        if turn:
            durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def _short_prompt(rig: Rig, number: int, num_tokens: int) -> SequenceStep:
    random, nothing = np.random.default_rng(number), np.empty(0, np.int32)
    return SequenceStep(
        request_id=RequestId(f"prompt {number}"),
        token_ids=random.integers(0, rig.config.text.vocab_size, num_tokens).astype(np.int32),
        num_computed_tokens=0,
        positions=np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1)),
        block_table=random.choice(len(rig.kv_blocks()), rig.num_blocks_of(num_tokens), replace=False).astype(np.int32),
        sample=SampleRequest(Sampling(temperature=0.0), nothing, nothing),
    )


def _plans(rig: Rig, chunk: int) -> list[StepPlan]:
    random, num_tokens = np.random.default_rng(0), rig.loads.prefill_tokens
    token_ids = random.integers(0, rig.config.text.vocab_size, num_tokens).astype(np.int32)
    table = random.permutation(len(rig.kv_blocks()))[: rig.num_blocks_of(num_tokens)].astype(np.int32)
    nothing = np.empty(0, np.int32)
    sample = SampleRequest(Sampling(temperature=0.0), nothing, nothing)
    plans = []
    for start in range(0, num_tokens, chunk):
        end = min(start + chunk, num_tokens)
        sequence = SequenceStep(
            request_id=RequestId("prompt"),
            token_ids=token_ids[start:end],
            num_computed_tokens=start,
            positions=np.tile(np.arange(start, end, dtype=np.int32), (3, 1)),
            block_table=table,
            sample=sample if end == num_tokens else None,
        )
        plans.append(StepPlan((sequence,)))
    return plans
