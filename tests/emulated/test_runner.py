"""An emulated runner says what `expected_tokens` says, and something else as soon as it attends to a wrong block."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.emulated.device import EmulatedDevice
from epd.emulated.runner import WORD_BYTES, EmulatedTextRunner, EmulatedVisionRunner
from epd.emulated.tokens import Words, embedding_rows, expected_tokens
from epd.step import PENDING, EmbeddingSpan, ImageInput, SampleRequest, SequenceStep, StepOutput, StepPlan
from gpu.emulated import CopyTimes, EmulatedBackend
from gpu.pool import PoolSpec
from protocol.messages import RequestId, Sampling
from tests.emulated.profiles import PROFILE
from tests.emulated.test_device import StepClock

BLOCK = 4
TIMES = CopyTimes(0.0, 1e15, {"kv": 1, "embedding": 1})
NOTHING = np.empty(0, np.int32)


@dataclass
class Bench:
    backend: EmulatedBackend
    device: EmulatedDevice
    runner: EmulatedTextRunner
    slots: Words

    def step(self, *sequences: SequenceStep) -> list[int | None]:
        output: StepOutput = self.runner.execute(StepPlan(sequences)).value()
        return [token.token_id if token else None for token in output.tokens]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with_pool = _bench()
    yield with_pool
    with_pool.device.close()
    with_pool.backend.close()


def _bench() -> Bench:
    backend = EmulatedBackend(1 << 30, TIMES)
    pool = backend.allocate_pool(PoolSpec(32, BLOCK * WORD_BYTES, "kv", 1))
    pool.blocks[:] = 255
    device = EmulatedDevice(PROFILE, clock=StepClock())
    slots = pool.array(np.uint64, (BLOCK,)).view(np.uint64)
    return Bench(backend, device, EmulatedTextRunner(device, pool, BLOCK, "decode"), slots)


def _sequence(tokens: list[int], computed: int, table: list[int], *, seed: int | None = None, **more: object) -> SequenceStep:
    sample = None if seed is None else SampleRequest(Sampling(seed=seed), NOTHING, NOTHING)
    positions = np.zeros((3, len(tokens)), np.int32)
    ids = np.array(tokens, np.int32)
    return SequenceStep(RequestId("r"), ids, computed, positions, np.array(table, np.int32), sample=sample, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 500), min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 29)),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_however_a_prompt_is_cut_the_tokens_are_those_expected(prompt: list[int], cuts: set[int], seed: int) -> None:
    bench = _bench()
    table = np.random.default_rng(0).permutation(32).tolist()[:12]
    edges = [0, *sorted(cut for cut in cuts if cut < len(prompt)), len(prompt)]
    for start, end in pairwise(edges):
        (token,) = bench.step(_sequence(prompt[start:end], start, table, seed=seed if end == len(prompt) else None))
    said = [token]
    for place in range(len(prompt), len(prompt) + 4):
        said += bench.step(_sequence([PENDING if place % 2 else said[-1] or 0], place, table, seed=seed))
    assert said == expected_tokens(prompt, 5, seed=seed)
    bench.device.close()
    bench.backend.close()


def test_a_batch_says_what_each_sequence_says_alone(bench: Bench) -> None:
    prompts = [[1, 2, 3], [9], [4, 5]]
    tables = [[0, 1], [2, 3], [4, 5]]
    tokens = bench.step(*(_sequence(prompt, 0, table, seed=7) for prompt, table in zip(prompts, tables, strict=True)))
    assert tokens == [expected_tokens(prompt, 1, seed=7)[0] for prompt in prompts]


def test_a_wrong_block_is_another_token(bench: Bench) -> None:
    """26 letters leave room for chance, so several tokens are compared."""
    prompt = [1, 2, 3, 4, 5]
    bench.step(_sequence(prompt, 0, [3, 8]))
    bench.slots[8] += 1
    said = [bench.step(_sequence([token], 5 + i, [3, 8, 9], seed=0))[0] for i, token in enumerate(expected_tokens(prompt, 6))]
    assert said != expected_tokens(prompt, 7)[1:]


def test_images_are_part_of_what_is_said(bench: Bench) -> None:
    pool = bench.backend.allocate_pool(PoolSpec(4, 2 * WORD_BYTES, "embedding", 2))
    vision = EmulatedVisionRunner(bench.device, pool, 2)
    rows = vision.preprocess(ImageInput("cat", b"", (1, 2, 3), 3))
    (sums,) = vision.encode_patches([rows], [(1, 2, 3)], [[2, 0]]).value()
    assert sums == pool.checksum([2, 0])
    scratch = bench.backend.allocate_scratch(2, 2 * WORD_BYTES)
    assert scratch.copy_from(pool, [2, 0], [0, 1], sums) == -1
    assert scratch.copy_from(pool, [0, 2], [0, 1], sums) == 0
    scratch.copy_from(pool, [2, 0], [0, 1], sums)
    np.testing.assert_array_equal(scratch.rows(1)[:3], embedding_rows("cat", 3))
    (token,) = bench.step(_sequence([5, 0, 0, 0, 6], 0, [1, 2], seed=3, embeddings=(EmbeddingSpan(1, scratch.rows(1)[:3]),)))
    assert [token] == expected_tokens([5, 0, 0, 0, 6], 1, seed=3, images=[(1, "cat", 3)])


def test_there_is_nothing_to_guide(bench: Bench) -> None:
    sequence = _sequence([5], 0, [0], seed=1)
    assert sequence.sample is not None
    guided = replace(sequence.sample, sampling=Sampling(guide="g"))
    with pytest.raises(ValueError, match="no logits"):
        bench.runner.execute(StepPlan((replace(sequence, sample=guided),)))


def test_results_wait_for_the_device_and_the_next_call_does_not(bench: Bench) -> None:
    """Two steps are with the device before the first of them is done."""
    clock = StepClock()
    clock.gate.clear()
    device = EmulatedDevice(PROFILE, clock=clock)
    pool = bench.backend.allocate_pool(PoolSpec(4, BLOCK * WORD_BYTES, "kv", 1))
    runner = EmulatedTextRunner(device, pool, BLOCK, "decode")
    stream = bench.backend.open_stream("decode")
    first: Future[StepOutput] = stream.submit(runner.execute, StepPlan((_sequence([5], 0, [0], seed=1),)))
    second: Future[StepOutput] = stream.submit(runner.execute, StepPlan((_sequence([PENDING], 1, [0], seed=1),)))
    stream.submit(int).result(timeout=20)  # both have been launched
    assert not first.done()
    clock.gate.set()
    tokens = [future.result(timeout=20).tokens[0] for future in (first, second)]
    assert [token.token_id for token in tokens if token] == expected_tokens([5], 2, seed=1)
    device.close()
