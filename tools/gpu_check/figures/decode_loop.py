"""Decode as its stage runs it, without the messages: scheduler, flights and runner on a stream, two steps in flight.

All requests run from the start to the end, so that every step has as many rows. Their blocks lie in no order in the pool.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import uvloop

from epd.cache.block_pool import BlockPool
from epd.decode.request import DecodePlan, DecodeRequest, DecodeStep
from epd.decode.scheduler import DecodeConfig, DecodeScheduler
from epd.flights import Flights
from epd.step import SampleRequest, SequenceStep, StepPlan, TextRunner
from gpu.stream import Stream
from protocol.messages import RequestId, Sampling, Token

STEPS_IN_FLIGHT = 2
_UNCOUNTED = 8  # steps at the start, until two are always in flight
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Of steps that follow each other. `mean_context`: tokens that a row attends to, over all counted steps."""

    step_s: float  # from one step's end to the next one's: the median
    device_s: float  # of it between the step's first launch and its last, on the device: the median
    idle_share: float  # of all the time, what the device had no step
    mean_context: float


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """`context` is what the last step of all attends to."""

    batch: int
    context: int
    num_steps: int

    @property
    def num_prompt_tokens(self) -> int:
        return self.context - self.num_steps - _UNCOUNTED


def run_decode(
    runner: TextRunner, stream: Stream, load: DecodeLoad, *, num_blocks: int, block_size: int, max_model_len: int, vocab_size: int
) -> Pace:
    """Raises ValueError for contexts that are too short for so many steps, or a pool that is too small for the batch."""
    if load.num_prompt_tokens < 1:
        raise ValueError(f"{load.num_steps + _UNCOUNTED} steps do not end at a context of {load.context}")
    blocks = BlockPool(num_blocks)
    scheduler = DecodeScheduler(
        DecodeConfig(
            block_size=block_size,
            max_running=load.batch,
            max_model_len=min(max_model_len, num_blocks * block_size),
            max_steps_in_flight=STEPS_IN_FLIGHT,
        ),
        blocks,
    )
    tables = _Tables()
    for request, table in _requests(load, blocks, block_size, vocab_size):
        scheduler.adopt(request, table, Token(1))
    return uvloop.run(_steps(scheduler, runner, stream, tables, load))


async def _steps(scheduler: DecodeScheduler, runner: TextRunner, stream: Stream, tables: _Tables, load: DecodeLoad) -> Pace:
    woken = asyncio.Event()
    flights: Flights[DecodePlan] = Flights(stream, runner, wake=woken.set, clock=time.perf_counter)
    ends: list[float] = []
    on_device: list[float] = []
    async with asyncio.timeout(_TIMEOUT_S):
        while scheduler.num_running or len(flights):
            woken.clear()
            for landing in flights.landed():
                if isinstance(landing.output, Exception):
                    raise landing.output
                ends.append(landing.landed_s)
                on_device.append(landing.output.elapsed_s)
                scheduler.commit(landing.plan, landing.output.tokens)
            while scheduler.can_plan and (plan := scheduler.plan()).steps:
                flights.launch(plan, tables.describe)
            if len(flights):
                await woken.wait()
    counted = slice(_UNCOUNTED, _UNCOUNTED + load.num_steps)
    whole_s = ends[counted][-1] - ends[_UNCOUNTED - 1]
    return Pace(
        step_s=statistics.median(
            after - before for before, after in pairwise(ends[_UNCOUNTED - 1 : _UNCOUNTED + load.num_steps])
        ),
        device_s=statistics.median(on_device[counted]),
        idle_share=max(0.0, 1 - sum(on_device[counted]) / whole_s),
        mean_context=load.context - (load.num_steps - 1) / 2,
    )


class _Tables:
    """What `decode.entry.Entry` does for the stage: requests' shares of a step, their block tables as arrays."""

    def __init__(self) -> None:
        self._arrays: dict[RequestId, np.ndarray[tuple[int], np.dtype[np.int32]]] = {}

    def describe(self, plan: DecodePlan) -> StepPlan:
        return StepPlan(tuple(self._sequence(step) for step in plan.steps))

    def _sequence(self, step: DecodeStep) -> SequenceStep:
        request = step.request
        table = self._arrays.get(request.request_id)
        if table is None or len(table) != len(request.block_table):
            table = self._arrays[request.request_id] = np.array(request.block_table, np.int32)
        return SequenceStep(
            request_id=request.request_id,
            token_ids=np.array([step.token_id], np.int32),
            num_computed_tokens=step.position,
            positions=np.full((3, 1), step.position, np.int32),
            block_table=table,
            sample=SampleRequest(request.sampling, request.prompt_token_ids, request.output_until(step.position)),
        )


def _requests(load: DecodeLoad, blocks: BlockPool, block_size: int, vocab_size: int) -> Iterator[tuple[DecodeRequest, list[int]]]:
    """Prompts of their own, so that nothing is shared, and a token for every step and the first."""
    random = np.random.default_rng(0)
    each = -(-load.context // block_size)
    taken = blocks.allocate(load.batch * each)
    if taken is None:
        raise ValueError(f"{load.batch} contexts of {load.context} tokens do not fit {blocks.num_blocks} blocks of {block_size}")
    scattered = random.permutation(taken).reshape(load.batch, each).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=load.num_steps + _UNCOUNTED + 1, ignore_eos=True)
    for number, table in enumerate(scattered):
        request = DecodeRequest(
            request_id=RequestId(f"r{number}"),
            epoch=1,
            token_ids=random.integers(0, vocab_size, load.num_prompt_tokens).astype(np.int32),
            num_prompt_tokens=load.num_prompt_tokens,
            items=(),
            sampling=sampling,
            deadline=float("inf"),
        )
        yield request, table
