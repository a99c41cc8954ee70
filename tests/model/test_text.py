"""The language model against transformers: logits at every position, whatever the chunks and the block size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from epd.step import SampleRequest, SequenceStep, StepPlan
from tests.model.reference import CASE_NAMES, Engine, Model, Prompt, Running

ModelOf = Callable[[str], Model]
OpenEngine = Callable[..., Engine]


@pytest.mark.parametrize("name", CASE_NAMES)
def test_logits_equal_those_of_transformers(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of(name)
    prompt = model.prompt(seed=3, length=40)
    expected = model.reference_logits(prompt)
    whole = _last_logits(open_engine(model), prompt, chunk=10_000)
    assert _relative_error(whole[-1], expected[-1]) < 1e-4
    # One token a step, so that every position is looked at, image positions too.
    every = _last_logits(open_engine(model), prompt, chunk=1)
    assert _relative_error(every, expected) < 1e-4


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize(("chunk", "block_size"), [(2, 16), (7, 1), (16, 5), (33, 32)])
def test_chunks_give_what_the_whole_prompt_gives(
    name: str, chunk: int, block_size: int, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    model = model_of(name)
    prompt = model.prompt(seed=5, length=30)
    expected = model.reference_logits(prompt)
    ends = [min(start + chunk, len(prompt.token_ids)) - 1 for start in range(0, len(prompt.token_ids), chunk)]
    logits = _last_logits(open_engine(model, block_size=block_size, num_blocks=1024 // block_size), prompt, chunk=chunk)
    assert _relative_error(logits, expected[ends]) < 1e-4


@pytest.mark.parametrize("name", CASE_NAMES)
def test_no_cut_of_a_prompt_changes_a_bit(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    """As long as no chunk is a single token, which the kernel of decode serves."""
    model = model_of(name)
    prompt = model.prompt(seed=6, length=37)
    whole = _last_logits(open_engine(model), prompt, chunk=10_000)[-1]
    for chunk in (2, 3, 16, 40):
        if len(prompt.token_ids) % chunk != 1:
            np.testing.assert_array_equal(_last_logits(open_engine(model), prompt, chunk=chunk)[-1], whole)


def test_nothing_but_the_last_rows_changes_what_is_sampled(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """A step of which only some rows sample, in any order in the plan, gives the rows of steps of their own."""
    model = model_of("vl-deepstack-every-layer")
    prompts = [model.prompt(seed=seed, length=length) for seed, length in ((1, 4), (2, 20), (3, 11))]
    alone = [_last_logits(open_engine(model), prompt, chunk=10_000)[-1] for prompt in prompts]
    engine = open_engine(model)
    running = [engine.sequence(prompt) for prompt in prompts]
    steps = [each.step(10_000) for each in running]
    steps[1] = _without_sampling(steps[1])
    logits = engine.runner.logits(StepPlan(tuple(steps)))
    assert logits.shape == (2, 97)
    assert _relative_error(logits[0], alone[0]) < 1e-5
    assert _relative_error(logits[1], alone[2]) < 1e-5


def test_a_sampled_row_may_be_an_image_token(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """Deepstack reaches the last layer here, and the prompt ends inside the image."""
    model = model_of("vl-deepstack-every-layer")
    prompt = model.prompt(seed=4, length=6)
    expected = model.reference_logits(prompt)
    item = prompt.items[0]
    engine = open_engine(model)
    running = engine.sequence(prompt)
    step = running.step(item.offset + 2)
    request = SampleRequest(running.sampling, prompt.token_ids, np.empty(0, np.int32))
    sampled = SequenceStep(step.request_id, step.token_ids, 0, step.positions, step.block_table, step.embeddings, request)
    assert _relative_error(engine.runner.logits(StepPlan((sampled,)))[0], expected[item.offset + 1]) < 1e-4


def test_a_step_that_samples_nothing_has_no_logits(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mqa-wide"))
    step = _without_sampling(engine.sequence(engine.model.prompt(seed=1)).step(10_000))
    assert engine.runner.logits(StepPlan((step,))).shape == (0, 97)
    assert engine.runner.execute(StepPlan((step,))).tokens == (None,)


def _last_logits(engine: Engine, prompt: Prompt, *, chunk: int) -> npt.NDArray[np.float32]:
    """Logits at the last token of every chunk [num_chunks, vocab_size]."""
    running: Running = engine.sequence(prompt, num_tokens=1)
    collected = []
    while running.computed < len(prompt.token_ids):
        step = running.step(chunk)
        request = SampleRequest(running.sampling, prompt.token_ids, np.empty(0, np.int32))
        step = SequenceStep(
            step.request_id,
            step.token_ids,
            step.num_computed_tokens,
            step.positions,
            step.block_table,
            step.embeddings,
            request,
        )
        collected.append(engine.runner.logits(StepPlan((step,)))[0].copy())
        running.take(None)
    return np.stack(collected)


def _without_sampling(step: SequenceStep) -> SequenceStep:
    return SequenceStep(
        step.request_id, step.token_ids, step.num_computed_tokens, step.positions, step.block_table, step.embeddings
    )


def _relative_error(ours: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
