"""The runners: greedy tokens equal transformers' generate, in any batch, and a broken image fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from epd.errors import BadConfig, BadImage
from epd.model.config import load_model_config
from epd.model.preprocess import image_grid, num_image_tokens
from epd.model.runner import TextModelRunner, VisionModelRunner
from epd.step import PENDING, ImageInput, SequenceStep, StepPlan
from gpu.backend import open_backend
from gpu.pool import PoolSpec
from protocol.messages import RequestId, Sampling, Token
from tests.model.reference import CASE_NAMES, VL_NAMES, Engine, Model, Running, encode, png

ModelOf = Callable[[str], Model]
OpenEngine = Callable[..., Engine]
SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=11)


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("chunk", [10_000, 9])
def test_greedy_tokens_equal_generate(name: str, chunk: int, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of(name)
    engine = open_engine(model)
    for seed in range(3):
        prompt = model.prompt(seed, length=8 + 5 * seed)
        assert _ids(engine.generate(prompt, num_tokens=12, chunk=chunk)) == model.reference_tokens(prompt, 12)


@pytest.mark.parametrize("name", ["qwen3-gqa4-tied", "vl-deepstack2-tied"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_a_mix_of_requests_gives_each_its_own_tokens(
    name: str, sampling: Sampling, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    """32 requests that arrive one after another, in chunks of different sizes, so that steps mix chunks and single tokens."""
    model = model_of(name)
    prompts = [model.prompt(seed, length=1 + 3 * seed % 17) for seed in range(32)]
    engine = open_engine(model, block_size=8, num_blocks=1024)
    expected = [_ids(engine.generate(prompt, sampling, num_tokens=6)) for prompt in prompts]
    engine = open_engine(model, block_size=16, num_blocks=1024)
    running = [engine.sequence(prompt, sampling, num_tokens=6) for prompt in prompts]
    kinds: set[frozenset[bool]] = set()
    for now in range(10_000):
        active = [each for each in running[: 1 + 2 * now] if not each.done]
        if not active:
            break
        steps = [each.step(3 + (now + i) % 29) for i, each in enumerate(active)]
        kinds.add(frozenset(len(step.token_ids) == 1 for step in steps))
        output = engine.runner.execute(StepPlan(tuple(steps)))
        for each, token in zip(active, output.tokens, strict=True):
            each.take(token)
    assert [_ids(each.output) for each in running] == expected
    assert frozenset((True, False)) in kinds  # steps that mix both were among them


def test_two_runners_share_one_model(model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of("qwen3-mha-bias")
    engine = open_engine(model)
    other = TextModelRunner(model.config, engine.runner.model, engine.backend, engine.pool, engine.block_size)
    assert other.model is engine.runner.model
    prompt = model.prompt(seed=1)
    expected = _ids(engine.generate(prompt, num_tokens=5))
    first = engine.sequence(prompt, num_tokens=5)
    _run([first], engine.runner, until=1)
    _run([first], other, until=5)  # prefill by one, decode by the other
    assert _ids(first.output) == expected


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_a_token_may_be_fed_before_it_is_known(sampling: Sampling, model_of: ModelOf, open_engine: OpenEngine) -> None:
    """Two requests; every second step of theirs is described before the one before it has been executed."""
    model = model_of("qwen3-gqa4-tied")
    engine = open_engine(model)
    prompts = [model.prompt(seed, length=5 + seed) for seed in range(2)]
    expected = [_ids(engine.generate(prompt, sampling, num_tokens=7)) for prompt in prompts]
    running = [engine.sequence(prompt, sampling, num_tokens=7) for prompt in prompts]
    _run(running, engine.runner, until=1)
    for _ in range(3):
        known = StepPlan(tuple(_named(each, number) for number, each in enumerate(running)))
        for each in running:
            each.take(Token(PENDING))
        ahead = StepPlan(tuple(_named(each, number) for number, each in reversed(list(enumerate(running)))))
        for each, token in zip(running, engine.runner.execute(known).tokens, strict=True):
            assert token is not None
            each.output[-1] = token
        for each, token in zip(reversed(running), engine.runner.execute(ahead).tokens, strict=True):
            each.take(token)
    assert [_ids(each.output) for each in running] == expected


def test_a_token_that_the_last_step_did_not_draw_cannot_be_fed(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-gqa4-tied"))
    first, second = (engine.sequence(engine.model.prompt(seed), num_tokens=5) for seed in range(2))
    first.take(engine.runner.execute(StepPlan((_named(first, 1),))).tokens[0])
    engine.runner.execute(StepPlan((_named(second, 2),)))
    first.output[-1] = Token(PENDING)
    with pytest.raises(ValueError, match="r1 is to go on with a token that the last step did not draw"):
        engine.runner.execute(StepPlan((_named(first, 1),)))


def test_threads_change_nothing(model_of: ModelOf, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epd.model.linear._WORTH_SHARING", 0)
    model = model_of("vl-deepstack2-tied")
    engine = open_engine(model)
    prompt = model.prompt(seed=1)
    step = StepPlan((engine.sequence(prompt).step(10_000),))
    alone = engine.runner.logits(step).copy()
    threaded = TextModelRunner(model.config, model.text_weights, engine.backend, engine.pool, engine.block_size, num_threads=2)
    np.testing.assert_array_equal(threaded.logits(step), alone)
    threaded.close()
    torch.set_num_threads(1)


def test_joined_weights_are_not_kept_twice(model_of: ModelOf) -> None:
    weights = model_of("qwen3-mha-bias").text_weights
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    joined = weights.joined(names)
    assert joined is not None
    assert weights.joined(names) is joined
    assert weights.tensor(names[1]).data_ptr() == joined[len(weights.tensor(names[0])) :].data_ptr()


def test_a_pool_of_other_blocks_is_refused(model_of: ModelOf) -> None:
    model = model_of("qwen3-mha-bias")
    backend = open_backend("cpu")
    block_bytes = int(np.prod(model.config.kv_block_shape(16))) * 4
    pool = backend.allocate_pool(PoolSpec(4, block_bytes, "kv", model.config.kv_layout(16)))
    with pytest.raises(BadConfig, match="8 tokens a block"):
        TextModelRunner(model.config, model.text_weights, backend, pool, 8)
    backend.close()


@pytest.mark.parametrize("name", VL_NAMES)
def test_a_broken_image_fails_alone(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    good = [_image(model, png(np.random.default_rng(i), 40 + 20 * i, 33)) for i in range(2)]
    cut = ImageInput("cut", good[1].data[:150], good[1].grid, good[1].num_tokens)
    first, broken, second = encode(model, (good[0], cut, good[1]))
    assert isinstance(broken, BadImage)
    for image, rows in ((good[0], first), (good[1], second)):
        (alone,) = encode(model, (image,))
        assert isinstance(rows, np.ndarray)
        assert isinstance(alone, np.ndarray)
        assert rows.shape == (image.num_tokens, model.config.embedding_width)
        np.testing.assert_allclose(rows, alone, rtol=0, atol=1e-4 * float(np.abs(alone).max()))


def test_encoding_nothing_but_broken_images_is_no_error(model_of: ModelOf) -> None:
    outcomes = encode(model_of(VL_NAMES[0]), (ImageInput("x", b"not an image", (1, 2, 2), 1),))
    assert [type(outcome) for outcome in outcomes] == [BadImage]


def test_a_text_model_has_no_vision_runner(model_of: ModelOf) -> None:
    text = model_of("qwen3-mha-bias")
    backend = open_backend("cpu")
    pool = backend.allocate_pool(PoolSpec(1, 64, "embedding", 1))
    with pytest.raises(BadConfig, match="no vision tower"):
        VisionModelRunner(load_model_config(text.folder), text.text_weights, backend, pool, 1)
    backend.close()


def _image(model: Model, data: bytes) -> ImageInput:
    assert model.config.image is not None
    grid = image_grid(data, model.config.image)
    return ImageInput("image", data, grid, num_image_tokens(grid, model.config.image.merge_size))


def _named(running: Running, number: int) -> SequenceStep:
    return replace(running.step(10_000), request_id=RequestId(f"r{number}"))


def _run(running: Sequence[Running], runner: TextModelRunner, *, until: int) -> None:
    while len(running[0].output) < until:
        output = runner.execute(StepPlan(tuple(each.step(10_000) for each in running)))
        for each, token in zip(running, output.tokens, strict=True):
            each.take(token)


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]
