"""The language model on a device against transformers and against the CPU's model, whatever the chunks and the block size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from epd.model.batch import make_batch
from epd.model.device.text import Inputs
from epd.step import EmbeddingSpan, SampleRequest, SequenceStep, StepPlan
from protocol.messages import Token
from tests.model.device.engine import CastWeights, DeviceEngine, Target
from tests.model.reference import CASE_NAMES, VL_NAMES, Model, Prompt, Running, half_image_rows

ModelOf = Callable[[str], Model]
OpenEngine = Callable[..., DeviceEngine]
Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("name", CASE_NAMES)
def test_logits_equal_those_of_transformers(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of(name)
    prompt = model.prompt(seed=3, length=40)
    expected = model.reference_logits(prompt)
    engine = open_engine(model)
    whole = _last_logits(engine, prompt, chunk=10_000)
    assert _error(whole[-1], expected[-1]) < 1e-4
    # One token a step, so that every position is looked at, image positions too.
    assert _error(_last_logits(engine, prompt, chunk=1), expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen3-mha-bias", "vl-deepstack3-merge3", "vl-deepstack-every-layer"])
@pytest.mark.parametrize(("chunk", "block_size"), [(2, 16), (7, 1), (33, 32)])
def test_chunks_give_what_the_whole_prompt_gives(
    name: str, chunk: int, block_size: int, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    model = model_of(name)
    prompt = model.prompt(seed=5, length=30)
    expected = model.reference_logits(prompt)
    ends = [min(start + chunk, len(prompt.token_ids)) - 1 for start in range(0, len(prompt.token_ids), chunk)]
    logits = _last_logits(open_engine(model, block_size=block_size, num_blocks=1024 // block_size), prompt, chunk=chunk)
    assert _error(logits, expected[ends]) < 1e-4


@pytest.mark.parametrize("name", CASE_NAMES)
def test_kv_and_logits_equal_those_of_the_cpu_model(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of(name)
    engine = open_engine(model)
    running = [engine.sequence(model.prompt(seed=seed, length=length)) for seed, length in ((1, 4), (2, 20), (3, 1))]
    plan = StepPlan(tuple(each.step(10_000) for each in running))
    assert _error(engine.device_runner.logits(plan), engine.runner.logits(plan)) < 1e-5
    ours, theirs = engine.kv.float().cpu().numpy(), engine.pool.array(np.float32, engine.kv.shape[1:])
    written = ~np.isnan(ours)
    assert _error(ours[written], theirs[written].astype(np.float32)) < 1e-5
    assert not theirs[~written].any()


@pytest.mark.parametrize("name", CASE_NAMES)
def test_bfloat16_errs_no_more_than_transformers_in_bfloat16(name: str, model_of: ModelOf, half_target: Target) -> None:
    """Both compared with float32 and the same, rounded weights, over all positions: the root of the mean square."""
    model = model_of(name)
    prompt = model.prompt(seed=3, length=40)
    rounded = copy.copy(model)
    rounded.reference = copy.deepcopy(model.reference)
    state = rounded.reference.state_dict()
    rounded.reference.load_state_dict({key: value if "visual" in key else value.bfloat16() for key, value in state.items()})
    exact, theirs = rounded.reference_logits(prompt), _half_reference_logits(model, prompt)
    engine = DeviceEngine(model, half_target, weights=CastWeights(model.text_weights, torch.bfloat16))
    ours = _last_logits(engine, prompt, chunk=1)
    engine.close()
    assert 1e-3 < _mean_error(ours, exact) < 1.1 * _mean_error(theirs, exact)


@pytest.mark.parametrize("name", VL_NAMES)
def test_embedding_rows_may_be_on_the_device(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of(name)
    prompt = model.prompt(seed=8)
    engine = open_engine(model)
    step = engine.sequence(prompt).step(10_000)
    expected = engine.device_runner.logits(StepPlan((step,)))
    spans = tuple(EmbeddingSpan(span.offset, torch.from_numpy(span.rows).to(engine.kv.device)) for span in step.embeddings)
    np.testing.assert_array_equal(engine.device_runner.logits(StepPlan((replace(step, embeddings=spans),))), expected)


def test_nothing_but_the_last_rows_changes_what_is_sampled(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """A step of which only some rows sample, in any order in the plan, gives the rows of steps of their own."""
    model = model_of("vl-deepstack-every-layer")
    prompts = [model.prompt(seed=seed, length=length) for seed, length in ((1, 4), (2, 20), (3, 11))]
    alone = [_last_logits(open_engine(model), prompt, chunk=10_000)[-1] for prompt in prompts]
    engine = open_engine(model)
    steps = [engine.sequence(prompt).step(10_000) for prompt in prompts]
    steps[1] = replace(steps[1], sample=None)
    logits = engine.device_runner.logits(StepPlan(tuple(steps)))
    assert logits.shape == (2, 97)
    assert _error(logits[0], alone[0]) < 1e-5
    assert _error(logits[1], alone[2]) < 1e-5


@pytest.mark.parametrize("first", [0, 2])
def test_a_sampled_row_may_be_an_image_token(first: int, model_of: ModelOf, open_engine: OpenEngine) -> None:
    """Deepstack reaches the last layer here, and the prompt ends inside the image, by a chunk or by a token alone."""
    model = model_of("vl-deepstack-every-layer")
    prompt = model.prompt(seed=4, length=6)
    expected = model.reference_logits(prompt)
    end = prompt.items[0].offset + 2
    engine = open_engine(model)
    running = engine.sequence(prompt)
    if first:
        engine.execute([running.step(end - 1)])
        running.take(None)
    step = _sampling(running, running.step(end - running.computed))
    assert len(step.token_ids) == (1 if first else end)
    assert _error(engine.device_runner.logits(StepPlan((step,)))[0], expected[end - 1]) < 1e-4


def test_a_step_that_samples_nothing_has_no_logits(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mqa-wide"))
    step = replace(engine.sequence(engine.model.prompt(seed=1)).step(10_000), sample=None)
    assert engine.device_runner.logits(StepPlan((step,))).shape == (0, 97)
    assert engine.execute([step]) == (None,)


@pytest.mark.parametrize("name", ["qwen3-gqa4-tied", "vl-deepstack2-tied", "vl-deepstack-every-layer"])
def test_fused_layers_give_what_separate_ones_give(name: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    """Logits and KV, of rows that end at different places, one of them padding."""
    engine = open_engine(model_of(name))
    separate, fused = _single_steps(engine)
    assert torch.isfinite(separate).all()
    assert _error(fused.cpu().numpy(), separate.cpu().numpy()) < 1e-5


def test_fused_layers_round_less(model_of: ModelOf, half_target: Target) -> None:
    """bfloat16 against float32 and the same, rounded weights."""
    model, errors = model_of("qwen3-gqa4-tied"), []
    weights = CastWeights(model.text_weights, torch.bfloat16)
    exact_target = replace(half_target, dtype=torch.float32)
    engines = [DeviceEngine(model, target, weights=weights) for target in (exact_target, half_target)]
    exact, _ = _single_steps(engines[0])
    for logits in _single_steps(engines[1]):
        errors.append(_mean_error(logits.cpu().numpy(), exact.cpu().numpy()))
    for engine in engines:
        engine.close()
    assert 1e-3 < errors[1] < 1.05 * errors[0]


def test_a_model_with_biases_is_not_for_fused_layers(model_of: ModelOf, open_engine: OpenEngine) -> None:
    assert open_engine(model_of("qwen3-gqa4-tied")).device_model.max_fused_rows > 0
    engine = open_engine(model_of("qwen3-mha-bias"))
    assert engine.device_model.max_fused_rows == 0
    with pytest.raises(ValueError, match="3 rows"):
        _single_steps(engine)


def _single_steps(engine: DeviceEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one more token for three sequences, by separate and by fused layers, which must store the same KV."""
    model, device = engine.device_model, engine.kv.device
    running = [engine.sequence(engine.model.prompt(seed=seed, length=length)) for seed, length in ((1, 4), (2, 20), (3, 11))]
    for each in running:
        engine.execute([replace(each.step(10_000), sample=None)])
        each.take(Token(7))
    batch = make_batch(StepPlan(tuple(each.step(1) for each in running)), engine.block_size)
    slots = torch.from_numpy(batch.slots)
    slots[2] = -1  # padding stores nothing, and attends to what is there
    inputs = Inputs(
        token_ids=torch.from_numpy(batch.token_ids).to(device),
        positions=torch.from_numpy(batch.positions).to(device),
        slots=slots.to(device),
        block_tables=torch.from_numpy(batch.block_tables).to(device),
        context_lens=torch.from_numpy(batch.context_lens).to(device) - torch.tensor([0, 0, 1], dtype=torch.int32, device=device),
    )
    drawn, buffers, before = torch.zeros(3, dtype=torch.int64, device=device), model.buffers(3), engine.kv.clone()
    separate = model.forward(inputs, drawn, engine.kv, buffers).clone()
    stored = engine.kv.clone()
    engine.kv.copy_(before)
    fused = model.forward_fused(inputs, drawn, engine.kv, buffers).clone()
    step = 1e-5 if model.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(engine.kv, stored, rtol=step, atol=step, equal_nan=True)
    assert not torch.equal(engine.kv.isnan(), before.isnan())
    return separate, fused


@torch.no_grad()
def _half_reference_logits(model: Model, prompt: Prompt) -> Floats:
    """transformers in bfloat16, but for the image's features, which are float32 rounded to it, as ours are."""
    half = type(model.reference).from_pretrained(model.folder, dtype=torch.bfloat16)
    inputs: dict[str, Any] = dict(model.reference_inputs(prompt))
    if prompt.items:
        features = model.reference.model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
        features.pooler_output = half_image_rows(features.pooler_output)
        features.deepstack_features = [half_image_rows(layer) for layer in features.deepstack_features]
        inputs["mm_encoder_outputs"] = {"image": features}
    return np.asarray(half(**inputs).logits[0].float().numpy())


def _last_logits(engine: DeviceEngine, prompt: Prompt, *, chunk: int) -> Floats:
    """Logits at the last token of every chunk [num_chunks, vocab_size]."""
    running = engine.sequence(prompt, num_tokens=1)
    collected = []
    while running.computed < len(prompt.token_ids):
        step = _sampling(running, running.step(chunk))
        collected.append(engine.device_runner.logits(StepPlan((step,)))[0].copy())
        running.take(None)
    return np.stack(collected)


def _sampling(running: Running, step: SequenceStep) -> SequenceStep:
    return replace(step, sample=SampleRequest(running.sampling, running.prompt.token_ids, np.empty(0, np.int32)))


def _error(ours: Floats, reference: Floats) -> float:
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def _mean_error(ours: Floats, exact: Floats) -> float:
    return float(np.sqrt(((ours - exact) ** 2).mean()) / np.sqrt((exact**2).mean()))
