"""The device's sampler against the CPU's: the same tokens for the same logits, requests and noise, in any batch."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd.model.device import sampler
from epd.model.device.inputs import Staging
from epd.model.device.sampler import _passing, _weights, is_greedy, sample
from epd.model.device.work_queue import open_queue
from epd.model.sampler import sample as sample_on_cpu
from epd.step import PENDING, SampleRequest
from protocol.messages import Sampling
from tests.model.device.engine import Target

Floats = npt.NDArray[np.float32]

VOCAB = 300  # more than one run of weights


def _request(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> SampleRequest:
    return SampleRequest(sampling, np.array(prompt or [], np.int32), np.array(output or [], np.int32))


def _logits(seed: int, rows: int = 1, vocab: int = VOCAB, *, ties: bool = False) -> Floats:
    logits = np.random.default_rng(seed).standard_normal((rows, vocab), np.float32) * 3
    return np.round(logits).astype(np.float32) if ties else logits


def _sample(
    logits: Floats, requests: list[SampleRequest], device: torch.device | None = None
) -> tuple[list[int], Floats, dict[int, tuple[float, list[int], list[float]]]]:
    """Tokens, the logits as they were left, and by row the log probabilities: chosen, best ids, best."""
    on = device or torch.device("cpu")
    tensor = torch.from_numpy(logits.copy()).to(on)
    drawn = torch.full((len(requests),), -7, dtype=torch.int64, device=on)
    found = sample(tensor, requests, drawn, Staging(open_queue(on)))
    logprobs = {}
    if found is not None:
        for row, chosen, ids, best in zip(
            found.rows, found.chosen.tolist(), found.best_ids.tolist(), found.best.tolist(), strict=True
        ):
            logprobs[row] = (chosen, ids, best)
    return drawn.tolist(), tensor.cpu().numpy(), logprobs


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20, VOCAB - 1, VOCAB, 1000]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**63),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (7, -100.0)), ((0, 100.0),)]),
    num_logprobs=st.sampled_from([-1, 0, 2]),
)
histories = st.lists(st.integers(0, VOCAB - 1), max_size=8)


@given(
    st.lists(st.tuples(samplings, histories, histories), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([0.0, -20.0]),
    st.sampled_from([0, 10, 1024]),
)
def test_a_batch_draws_what_the_cpu_draws_row_by_row(
    wanted: list[tuple[Sampling, list[int], list[int]]], seed: int, shift: float, few: int
) -> None:
    """`few` decides which rows' candidates are sorted and which ones' best are selected, and nothing else."""
    logits = _logits(seed, rows=len(wanted), ties=seed % 3 == 0) + np.float32(shift)
    requests = [_request(*each) for each in wanted]
    left = logits.copy()
    expected = sample_on_cpu(left, requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_FEW", few)
        tokens, changed, logprobs = _sample(logits, requests)
    assert tokens == [token.token_id for token in expected]
    np.testing.assert_array_equal(changed, left)
    for row, token in enumerate(expected):
        if requests[row].sampling.num_logprobs >= 0:
            chosen, ids, best = logprobs[row]
            num = len(token.top_logprobs)
            assert chosen == pytest.approx(token.logprob, abs=1e-9)
            assert ids[:num] == [each.token_id for each in token.top_logprobs]
            assert best[:num] == pytest.approx([each.logprob for each in token.top_logprobs], abs=1e-9)


@given(st.lists(st.tuples(samplings, st.floats(0.0, 1.0)), min_size=1, max_size=20), st.integers(0, 1000))
def test_a_guide_lets_through_what_it_lets_through_on_the_cpu(wanted: list[tuple[Sampling, float]], seed: int) -> None:
    """Some rows guided, by more or less, others not."""
    draw = np.random.default_rng(seed)
    logits = _logits(seed, rows=len(wanted))
    requests = []
    for sampling, share in wanted:
        bits = draw.random(VOCAB) < share
        bits[draw.integers(VOCAB)] = True
        allowed = np.zeros(-(-VOCAB // 32) * 4, np.uint8)
        packed = np.packbits(bits, bitorder="little")
        allowed[: len(packed)] = packed
        is_guided = share < 0.8
        guided = msgspec.structs.replace(sampling, guide="g" if is_guided else "")
        requests.append(replace(_request(guided, [1, 2], [2]), allowed=allowed.view(np.int32) if is_guided else None))
    tokens, changed, _ = _sample(logits, requests)
    left = logits.copy()
    assert tokens == [token.token_id for token in sample_on_cpu(left, requests)]
    np.testing.assert_array_equal(changed, left)
    for token, request in zip(tokens, requests, strict=True):
        assert request.allowed is None or request.allowed[token // 32] >> (token % 32) & 1


@pytest.mark.parametrize(("top_p", "count"), [(0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_nucleus_ends_with_the_token_that_reaches_it(top_p: float, count: int, target: Target) -> None:
    logits = np.array([[-90, 1, 1, -90, 1, 1]], np.float32).repeat(60, 0)
    requests = [_request(Sampling(top_p=top_p, seed=seed)) for seed in range(60)]
    assert set(_sample(logits, requests, target.device)[0]) == set([1, 2, 4, 5][:count])


def test_what_a_row_draws_does_not_depend_on_the_others() -> None:
    kinds = [
        Sampling(temperature=0.0),
        Sampling(),
        Sampling(top_k=5),
        Sampling(top_k=200),
        Sampling(top_p=0.5),
        Sampling(top_p=0.9, top_k=40, min_p=0.05),
        Sampling(temperature=0.0, presence_penalty=1.0),
    ]
    requests = [_request(_with_seed(kind, seed), [1], [2, 2]) for seed, kind in enumerate(kinds * 5)]
    logits = _logits(3, rows=len(requests))
    together, _, _ = _sample(logits, requests)
    alone = [_sample(logits[i : i + 1], [request])[0][0] for i, request in enumerate(requests)]
    backwards, _, _ = _sample(logits[::-1].copy(), requests[::-1])
    assert together == alone == backwards[::-1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=1500), Sampling(top_k=50, top_p=0.8)])
def test_a_large_vocabulary(sampling: Sampling, target: Target) -> None:
    logits = _logits(1, rows=20, vocab=20_000)
    requests = [_request(_with_seed(sampling, seed)) for seed in range(20)]
    tokens, _, _ = _sample(logits, requests, target.device)
    assert tokens == [token.token_id for token in sample_on_cpu(logits.copy(), requests)]


def test_every_share_is_as_wide_as_its_weight(target: Target) -> None:
    """Over an even grid of noise each token is drawn as often as its share says, give or take the grid."""
    logits = torch.from_numpy(_logits(2, rows=1, vocab=40)).to(target.device)
    num = 20_000
    noise = (torch.arange(num, dtype=torch.float64, device=target.device) + 0.5) / num
    weights = _weights(logits.expand(num, -1), torch.full((num,), 1 / 0.8, device=target.device), bits=50)
    counts = torch.bincount(_passing(weights, noise), minlength=40)
    shares = torch.softmax(logits[0].double() / 0.8, dim=0)
    assert float((counts / num - shares).abs().max()) <= 1.01 / num


def test_noise_at_both_ends_draws_a_token_that_may_be_drawn(target: Target) -> None:
    values = torch.full((2, VOCAB), -1e9, device=target.device)
    values[:, [5, 290]] = 0
    weights = _weights(values, torch.ones(2, device=target.device), bits=53)
    noise = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64, device=target.device)
    assert _passing(weights, noise).tolist() == [5, 290]


def test_a_token_that_is_not_known_yet_counts_for_the_noise() -> None:
    logits = _logits(4)
    known, pending = _request(Sampling(seed=9), output=[1, 2]), _request(Sampling(seed=9), output=[1, PENDING])
    different = _request(Sampling(seed=9), output=[1])
    assert _sample(logits, [known])[0] == _sample(logits, [pending])[0]
    many = _logits(4, rows=50)
    assert _sample(many, [known] * 50)[0] != _sample(many, [different] * 50)[0]


def test_a_batch_of_any_size_goes_through_in_groups() -> None:
    """Larger than a group, with rows of all kinds on both sides of every cut."""
    kinds = [
        Sampling(num_logprobs=2),
        Sampling(top_k=20),
        Sampling(top_p=0.7),
        Sampling(temperature=0.0, num_logprobs=0),
        Sampling(min_p=0.1, top_k=1100),
    ]
    requests = [_request(_with_seed(kinds[i % 5 if i < 150 else 2], i)) for i in range(200)]
    logits = _logits(6, rows=200, vocab=1200)
    tokens, _, logprobs = _sample(logits, requests)
    expected = sample_on_cpu(logits.copy(), requests)
    assert tokens == [token.token_id for token in expected]
    for row, (chosen, ids, _) in logprobs.items():
        assert chosen == pytest.approx(expected[row].logprob, abs=1e-9)
        assert ids[:2] == [each.token_id for each in expected[row].top_logprobs] or not requests[row].sampling.num_logprobs


def test_greedy_takes_the_first_of_equals(target: Target) -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[1, [4, 6]] = 2
    assert _sample(logits, [_request(Sampling(temperature=0.0))] * 2, target.device)[0] == [0, 4]


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (Sampling(temperature=0.0), True),
        (Sampling(temperature=0.0, top_k=3, top_p=0.5), True),
        (Sampling(), False),
        (Sampling(temperature=0.0, num_logprobs=0), False),
        (Sampling(temperature=0.0, logit_bias=((1, 1.0),)), False),
        (Sampling(temperature=0.0, repetition_penalty=1.1), False),
    ],
)
def test_what_goes_the_shortest_way(sampling: Sampling, greedy: bool) -> None:
    assert is_greedy([_request(Sampling(temperature=0.0)), _request(sampling)]) is greedy


def test_a_step_that_draws_nothing() -> None:
    assert is_greedy([])


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return msgspec.structs.replace(sampling, seed=seed)
