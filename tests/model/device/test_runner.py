"""The runner on a device: greedy tokens equal transformers' generate, in any batch, from graphs or not, overlapped or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from epd.errors import BadConfig
from epd.model.device.graphs import GraphOptions
from epd.model.device.runner import DeviceTextRunner
from epd.step import PENDING, SequenceStep, StepPlan
from gpu.cuda.reference import TorchKernels
from protocol.messages import RequestId, Sampling, Token
from tests.model.device.engine import NO_GRAPHS, DeviceEngine, Overlapped, Target
from tests.model.device.lagging import LaggingQueue
from tests.model.device.watching import HostRead, Unwatched, reads_are_errors
from tests.model.reference import CASE_NAMES, GREEDY, Model, Running

ModelOf = Callable[[str], Model]
OpenEngine = Callable[..., DeviceEngine]

FUSED = GraphOptions(linear="fused")
SAMPLED = Sampling(temperature=1.0, top_p=0.95, seed=11)
PLAIN = Sampling(temperature=0.8, seed=5)


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize(("chunk", "graphs"), [(10_000, None), (9, FUSED)])
def test_greedy_tokens_equal_generate(
    name: str, chunk: int, graphs: GraphOptions | None, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    model = model_of(name)
    engine = open_engine(model, graphs=graphs)
    for seed in range(2):
        prompt = model.prompt(seed, length=8 + 5 * seed)
        assert _ids(engine.generate(prompt, num_tokens=12, chunk=chunk)) == model.reference_tokens(prompt, 12)
    assert engine.device_runner.captured == {1}


@pytest.mark.parametrize("name", ["qwen3-gqa4-tied", "vl-deepstack2-tied"])
@pytest.mark.parametrize("graphs", [NO_GRAPHS, GraphOptions(max_batch=7), FUSED], ids=["eager", "graphs", "fused"])
def test_a_mix_of_requests_gives_each_its_own_tokens(
    name: str, graphs: GraphOptions, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    """Requests that arrive one after another, in chunks of different sizes, each sampled in its own way."""
    model = model_of(name)
    kinds = [GREEDY, SAMPLED, PLAIN, Sampling(temperature=0.0, num_logprobs=3), Sampling(top_k=4, frequency_penalty=0.5)]
    prompts = [model.prompt(seed, length=1 + 3 * seed % 17) for seed in range(20)]
    engine = open_engine(model, block_size=8, num_blocks=1024, graphs=graphs)
    expected = []
    for i, prompt in enumerate(prompts):
        alone = engine.sequence(prompt, kinds[i % len(kinds)], num_tokens=6)
        while not alone.done:
            alone.take(engine.runner.execute(StepPlan((alone.step(10_000),))).tokens[0])
        expected.append(alone.output)
    running = [engine.sequence(prompt, kinds[i % len(kinds)], num_tokens=6) for i, prompt in enumerate(prompts)]
    for now in range(10_000):
        active = [each for each in running[: 1 + 2 * now] if not each.done]
        if not active:
            break
        outputs = engine.execute([each.step(3 + (now + i) % 29) for i, each in enumerate(active)])
        for each, token in zip(active, outputs, strict=True):
            each.take(token)
    for ours, theirs in zip(running, expected, strict=True):
        assert _ids(ours.output) == _ids(theirs)
        for token, other in zip(ours.output, theirs, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [each.token_id for each in token.top_logprobs] == [each.token_id for each in other.top_logprobs]
    assert bool(engine.device_runner.captured) == (graphs is not NO_GRAPHS)


@pytest.mark.parametrize("graphs", [NO_GRAPHS, None, FUSED], ids=["eager", "graphs", "fused"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PLAIN], ids=["greedy", "nucleus", "plain"])
def test_steps_that_overlap_draw_the_same_tokens(
    graphs: GraphOptions | None, sampling: Sampling, model_of: ModelOf, open_engine: OpenEngine
) -> None:
    """Each step is launched before the tokens of the last are looked at; requests end at different times, so that rows move."""
    model = model_of("vl-deepstack2-tied")
    prompts = [model.prompt(seed, length=3 + 4 * seed) for seed in range(5)]
    engine = open_engine(model, graphs=graphs)
    expected = [_ids(engine.generate(prompt, sampling, num_tokens=3 + 4 * i)) for i, prompt in enumerate(prompts)]
    engine = open_engine(model, graphs=graphs)
    running = [engine.sequence(prompt, sampling, num_tokens=3 + 4 * i) for i, prompt in enumerate(prompts)]
    Overlapped(engine, running).run()
    assert [_ids(each.output) for each in running] == expected


def test_steps_may_be_given_to_a_device_that_has_done_none_of_them(model_of: ModelOf) -> None:
    """Three steps are launched, with fewer rows each, before the first of them begins."""
    model = model_of("vl-deepstack2-tied")
    queue = LaggingQueue(is_late=False)
    here = Target(torch.device("cpu"), torch.float32, TorchKernels())
    engine = DeviceEngine(model, here, queue=queue, block_size=8, graphs=GraphOptions(captured_at_start=4))
    engine.device_runner.prepare()
    running = [engine.sequence(model.prompt(seed, length=3 + 5 * seed), num_tokens=4) for seed in range(3)]
    prompts = [replace(each.step(10_000), request_id=RequestId(str(i))) for i, each in enumerate(running)]
    for each, token in zip(running, engine.execute(prompts), strict=True):
        each.take(token)
    queue.is_late = True
    outcomes = []
    for count in range(3):
        steps = []
        for i, each in enumerate(running[count:], count):
            step = replace(each.step(1), request_id=RequestId(str(i)))
            each.take(Token(PENDING))
            steps.append(step)
        outcomes.append(engine.device_runner.execute(StepPlan(tuple(steps))))
    assert queue.waiting
    for count, outcome in enumerate(outcomes):
        tokens = [token.token_id for token in outcome.value().tokens if token is not None]
        assert tokens == [model.reference_tokens(each.prompt, 2 + count)[-1] for each in running[count:]]
    engine.close()


def test_a_capture_amid_overlapped_steps_loses_no_token(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """The run before a capture draws too, from padding; what the last step drew must outlast it."""
    model = model_of("qwen3-mha-bias")
    prompts = [model.prompt(seed, length=5) for seed in range(3)]
    expected = [model.reference_tokens(prompt, 4) for prompt in prompts]
    engine = open_engine(model)
    running = [engine.sequence(prompt, num_tokens=4) for prompt in prompts]
    assert engine.device_runner.captured == frozenset()
    Overlapped(engine, running).run()
    assert engine.device_runner.captured
    assert [_ids(each.output) for each in running] == expected


def test_padding_stores_nothing_and_changes_nothing(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """Five rows in a bucket of eight, over a pool that holds no number where nothing was written."""
    model = model_of("qwen3-gqa4-tied")
    engine = open_engine(model, block_size=4)
    running = [engine.sequence(model.prompt(seed, length=5), num_tokens=4) for seed in range(5)]
    for each in running:
        each.take(engine.execute([each.step(10_000)])[0])
    before = engine.kv.clone()
    steps = [each.step(1) for each in running]
    tokens = engine.execute(steps)
    assert engine.device_runner.captured == {8}
    assert None not in tokens
    block_size = engine.block_size
    written = {int(step.block_table[5 // block_size]) * block_size + 5 % block_size for step in steps}
    changed = ~((engine.kv == before) | (engine.kv.isnan() & before.isnan()))
    blocks, places = torch.nonzero(changed.any(dim=5).any(dim=3).any(dim=2).any(dim=1), as_tuple=True)
    assert {int(block) * block_size + int(place) for block, place in zip(blocks, places, strict=True)} == written
    for each, token in zip(running, tokens, strict=True):
        each.take(token)
        assert _ids(each.output) == model.reference_tokens(each.prompt, 2)


def test_a_smaller_batch_after_a_larger_one_is_padded_again(model_of: ModelOf, open_engine: OpenEngine) -> None:
    """The host's arrays are used again: rows of the step before must not be stored to a second time."""
    model = model_of("qwen3-mha-bias")
    engine = open_engine(model, graphs=GraphOptions())
    running = [engine.sequence(model.prompt(seed, length=6), num_tokens=6) for seed in range(8)]
    for each in running:
        each.take(engine.execute([each.step(10_000)])[0])
    _step(engine, running)
    engine.kv[torch.from_numpy(running[7].block_table.astype(np.int64)).to(engine.kv.device)] = 5.0
    for _ in range(3):
        _step(engine, running[:5])
    assert (engine.kv[torch.from_numpy(running[7].block_table.astype(np.int64)).to(engine.kv.device)] == 5.0).all()
    for each in running[:5]:
        assert _ids(each.output) == model.reference_tokens(each.prompt, 5)


def test_what_is_captured_at_start_and_what_when_needed(model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of("qwen3-mha-bias")
    engine = open_engine(model, block_size=1, num_blocks=1024, graphs=GraphOptions(captured_at_start=1))
    engine.device_runner.prepare()
    assert engine.device_runner.captured == {1}
    running = [engine.sequence(model.prompt(seed, length=6), num_tokens=6) for seed in range(2)]
    for each in running:
        each.take(engine.execute([each.step(10_000)])[0])
    _step(engine, running)
    assert engine.device_runner.captured == {1, 2}


@pytest.mark.parametrize("max_tokens", [1, 40])
def test_what_goes_before_the_first_step_leaves_no_trace(max_tokens: int, model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of("vl-deepstack2-tied")
    engine = open_engine(model, max_tokens=max_tokens)
    engine.device_runner.prepare()
    assert engine.kv.isnan().all()
    prompt = model.prompt(seed=4)
    assert _ids(engine.generate(prompt, num_tokens=5)) == model.reference_tokens(prompt, 5)


def test_two_runners_share_one_model(model_of: ModelOf, open_engine: OpenEngine) -> None:
    model = model_of("qwen3-mha-bias")
    engine = open_engine(model)
    prompt = model.prompt(seed=1)
    other = DeviceTextRunner(engine.device_model, engine.kv, max_sequences=4, max_model_len=100)
    running = engine.sequence(prompt, num_tokens=5)
    running.take(engine.execute([running.step(10_000)])[0])  # prefill by one, decode by the other
    while not running.done:
        running.take(other.execute(StepPlan((running.step(1),))).value().tokens[0])
    assert _ids(running.output) == model.reference_tokens(prompt, 5)
    other.close()


@pytest.mark.parametrize("kind", ["never drawn", "drawn two steps ago", "after a step that failed", "in a chunk"])
def test_a_token_that_the_last_step_did_not_draw_is_refused(kind: str, model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mha-bias"))
    first, second = (engine.sequence(engine.model.prompt(seed, length=5)) for seed in range(2))
    engine.execute([replace(first.step(10_000), request_id=RequestId("a"))])
    match kind:
        case "drawn two steps ago":
            engine.execute([replace(second.step(10_000), request_id=RequestId("b"))])
        case "after a step that failed":
            with pytest.raises(ValueError, match="has no tokens"):
                engine.execute([replace(first.step(10_000), token_ids=np.empty(0, np.int32))])
    token_ids = np.array([PENDING, PENDING] if kind == "in a chunk" else [PENDING], np.int32)
    step = replace(second.step(10_000), token_ids=token_ids, positions=np.zeros((3, len(token_ids)), np.int32))
    with pytest.raises(ValueError, match="did not draw"):
        engine.execute([replace(step, request_id=RequestId("never" if kind == "never drawn" else "a"))])


def test_a_step_takes_time(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mha-bias"))
    step = engine.sequence(engine.model.prompt(seed=1)).step(10_000)
    assert engine.device_runner.execute(StepPlan((step,))).value().elapsed_s > 0


@pytest.mark.parametrize("graphs", [NO_GRAPHS, None, FUSED], ids=["eager", "graphs", "fused"])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        PLAIN,
        Sampling(top_k=4, top_p=0.9, min_p=0.1, num_logprobs=3, repetition_penalty=1.2, logit_bias=((3, 1.0),)),
        Sampling(top_p=0.5, num_logprobs=0),
    ],
    ids=["greedy", "plain", "all", "sorted"],
)
def test_a_step_reads_no_value_of_the_device(
    graphs: GraphOptions | None, sampling: Sampling, model_of: ModelOf, target: Target, open_engine: OpenEngine
) -> None:
    model = model_of("vl-deepstack2-tied")
    watched = replace(target, kernels=Unwatched(target.kernels))
    engine = open_engine(model, target=watched, graphs=graphs)
    running = [engine.sequence(model.prompt(seed, length=7), sampling, num_tokens=4) for seed in range(3)]
    for each in running[:2]:
        each.take(engine.execute([each.step(10_000)])[0])
    decode, prefill = [each.step(1) for each in running[:2]], [running[2].step(10_000)]
    with reads_are_errors(target.device):
        outcomes = [engine.device_runner.execute(StepPlan(tuple(steps))) for steps in (decode, prefill, decode)]
    assert all(None not in outcome.value().tokens for outcome in outcomes)
    assert bool(engine.device_runner.captured) == (graphs is not NO_GRAPHS)


def test_a_read_would_be_noticed(target: Target) -> None:
    values = torch.ones(3, device=target.device)
    for read in (lambda: values[0].item(), lambda: values[values > 0], lambda: bool(values.sum() > 1), values.nonzero):
        with pytest.raises((HostRead, RuntimeError)), reads_are_errors(target.device):
            read()


def test_more_sequences_than_were_said_are_refused(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mha-bias"), max_sequences=2)
    steps = [engine.sequence(engine.model.prompt(seed, length=3)).step(10_000) for seed in range(3)]
    with pytest.raises(ValueError, match="3 sequences"):
        engine.execute(steps)


def test_a_pool_of_other_blocks_is_refused(model_of: ModelOf, open_engine: OpenEngine) -> None:
    engine = open_engine(model_of("qwen3-mha-bias"))
    for pool in (engine.kv[:, :1], engine.kv.to(torch.bfloat16)):
        with pytest.raises(BadConfig, match="not those of this model"):
            DeviceTextRunner(engine.device_model, pool, max_sequences=1, max_model_len=16)


def test_bfloat16_runs_the_whole_way(model_of: ModelOf, half_target: Target) -> None:
    """That its tokens are right is said by its logits; here, that graphs and overlap change none of them on one device."""
    model = model_of("vl-deepstack2-tied")
    prompt = model.prompt(seed=2)
    outputs = []
    for graphs in (NO_GRAPHS, GraphOptions()):
        engine = DeviceEngine(model, half_target, graphs=graphs)
        running = engine.sequence(prompt, num_tokens=8)
        Overlapped(engine, [running]).run()
        outputs.append(_ids(running.output))
        assert outputs[-1] == _ids(engine.generate(prompt, num_tokens=8))
        engine.close()
    assert outputs[0] == outputs[1]


def _step(engine: DeviceEngine, running: Sequence[Running]) -> None:
    steps: list[SequenceStep] = [each.step(1) for each in running]
    for each, token in zip(running, engine.execute(steps), strict=True):
        each.take(token)


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]
