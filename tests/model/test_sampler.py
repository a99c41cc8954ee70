"""The sampler against a slow reference that sorts and loops, and against the distribution that it is to draw from."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.model.sampler import _draw, sample, uniform
from epd.step import SampleRequest
from protocol.messages import Sampling, Token

Floats = npt.NDArray[np.float32]


def _request(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> SampleRequest:
    return SampleRequest(sampling, np.array(prompt or [], np.int32), np.array(output or [], np.int32))


def _logits(seed: int, rows: int = 1, vocab: int = 50, *, ties: bool = False) -> Floats:
    logits = np.random.default_rng(seed).standard_normal((rows, vocab), np.float32) * 3
    return np.round(logits).astype(np.float32) if ties else logits


def _reference_values(logits: Floats, request: SampleRequest) -> dict[int, np.float32]:
    """Token id -> logit after penalties and bias."""
    sampling = request.sampling
    values = {i: np.float32(v) for i, v in enumerate(logits)}
    output = request.output_token_ids.tolist()
    for i in {*request.prompt_token_ids.tolist(), *output}:
        factor = np.float32(sampling.repetition_penalty)
        values[i] = values[i] / factor if values[i] > 0 else values[i] * factor
    for i in set(output):
        count = np.float32(output.count(i))
        values[i] -= np.float32(sampling.frequency_penalty) * count + np.float32(sampling.presence_penalty)
    for i, bias in sampling.logit_bias:
        values[i] += np.float32(bias)
    return values


def _reference_weights(logits: Floats, request: SampleRequest) -> dict[int, float]:
    """Token id -> weight of all that may be drawn, by definition and one number at a time."""
    sampling, values = request.sampling, _reference_values(logits, request)
    ranked = sorted(values, key=lambda i: (-values[i], i))
    if sampling.temperature < 1e-5:
        return {ranked[0]: 1.0}
    top = float(values[ranked[0]]) / sampling.temperature
    weights = {i: math.exp(float(values[i]) / sampling.temperature - top) for i in ranked}
    if sampling.top_k:
        weights = {i: weights[i] for i in ranked[: sampling.top_k]}
    if sampling.top_p < 1:
        total, before, kept = sum(weights.values()), 0.0, {}
        for i, weight in weights.items():
            if before < sampling.top_p * total:
                kept[i] = weight
            before += weight
        weights = kept
    highest = max(weights.values())
    return {i: weight for i, weight in weights.items() if weight >= sampling.min_p * highest}


def _reference_draw(weights: dict[int, float], noise: float) -> int:
    total, passed = sum(weights.values()), 0.0
    for i in sorted(weights):
        passed += weights[i]
        if passed > noise * total:
            return i
    return max(weights)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 49, 50, 1000]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**63),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (7, -100.0)), ((0, 100.0),)]),
)


@given(samplings, st.integers(0, 1000), st.lists(st.integers(0, 49), max_size=8), st.lists(st.integers(0, 49), max_size=8))
def test_equals_the_reference(sampling: Sampling, seed: int, prompt: list[int], output: list[int]) -> None:
    logits = _logits(seed, ties=seed % 3 == 0)
    request = _request(sampling, prompt, output)
    weights = _reference_weights(logits[0], request)
    expected = _reference_draw(weights, uniform(sampling.seed, len(output)))
    assert sample(logits.copy(), [request])[0].token_id == expected


@given(
    st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.3, 0.7, 1.0]), st.sampled_from([0, 7]), st.sampled_from([0.0, 0.02, 0.3])
)
def test_every_share_is_as_wide_as_the_reference_says(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for seed in range(4):
        logits = _logits(seed, ties=seed == 3)
        weights = _reference_weights(logits[0], _request(sampling))
        for noise in np.linspace(0.0005, 0.9995, 200).tolist():
            assert _draw(logits[0], sampling, noise) == _reference_draw(weights, noise)


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_nucleus_ends_with_the_token_that_reaches_it(top_p: float, count: int) -> None:
    logits = np.array([-90, 1, 1, -90, 1, 1], np.float32)
    drawn = {_draw(logits, Sampling(top_p=top_p), noise) for noise in np.linspace(0, 0.999, 100).tolist()}
    assert drawn == set([1, 2, 4, 5][:count])


@given(samplings, st.integers(0, 1000), st.lists(st.integers(0, 49), max_size=8), st.lists(st.integers(0, 49), max_size=8))
def test_penalties_and_bias_are_exact(sampling: Sampling, seed: int, prompt: list[int], output: list[int]) -> None:
    """Seen in the logits themselves, since a draw hides small mistakes."""
    logits = _logits(seed)
    request = _request(sampling, prompt, output)
    expected = _reference_values(logits[0], request)
    sample(logits, [request])
    np.testing.assert_array_equal(logits[0], np.array([expected[i] for i in range(50)], np.float32))


@pytest.mark.parametrize("top_p", [0.3, 0.999, 1.0])
@pytest.mark.parametrize("flat", [False, True])
def test_a_large_vocabulary_needs_no_full_sort_to_be_right(top_p: float, flat: bool) -> None:
    logits = _logits(1, vocab=20_000) * np.float32(0.01 if flat else 1.0)
    weights = _reference_weights(logits[0], _request(Sampling(top_p=top_p)))
    for seed in range(20):
        request = _request(Sampling(top_p=top_p, seed=seed))
        expected = _reference_draw(weights, uniform(seed, 0))
        assert sample(logits.copy(), [request])[0].token_id == expected


CRITICAL_999 = 37.697  # chi-square, 15 degrees of freedom, one in a thousand; the seeds are fixed, so it passes or it does not


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_distribution(over: str) -> None:
    logits = _logits(5, vocab=16) * np.float32(0.4)
    weights = np.exp(logits[0].astype(np.float64) / 0.8)
    expected = weights / weights.sum() * 4000
    counts = np.zeros(16)
    for i in range(4000):
        request = _request(Sampling(temperature=0.8, seed=i if over == "seeds" else 1234))
        if over == "positions":
            request = _request(request.sampling, output=[0] * i)
        counts[sample(logits.copy(), [request])[0].token_id] += 1
    assert float(((counts - expected) ** 2 / expected).sum()) < CRITICAL_999


def test_noise_is_uniform_and_neighbours_are_unrelated() -> None:
    noise = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = np.histogram(noise, bins=16, range=(0, 1))[0]
    assert float(((counts - 625) ** 2 / 625).sum()) < CRITICAL_999
    for shifted in (noise[1:, :-1] - 0.5, noise[:-1, 1:] - 0.5):  # the next seed, the next position
        assert abs(float((shifted * (noise[:-1, :-1] - 0.5)).mean())) < 0.004
    assert len(set(noise.ravel().tolist())) == noise.size


def test_noise_is_pinned() -> None:
    """A client that repeats a seed with a later version is to get the same draw."""
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(2**63 - 1, 5) == uniform(2**63 - 1, 5)
    assert uniform(1, 2) != uniform(2, 1)


def test_the_same_whatever_the_batch() -> None:
    logits = _logits(3, rows=6)
    samplings = [
        Sampling(temperature=0.0),
        Sampling(seed=1),
        Sampling(seed=1, top_k=5, num_logprobs=2),
        Sampling(temperature=0.0, num_logprobs=0),
        Sampling(seed=3, top_p=0.5),
        Sampling(temperature=0.0, presence_penalty=1.0),
    ]
    requests = [_request(each, [1, 2], [3, 4, 4]) for each in samplings]
    together = sample(logits.copy(), requests)
    alone = [sample(logits[i : i + 1].copy(), [request])[0] for i, request in enumerate(requests)]
    assert together == alone


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[1, [4, 6]] = 2
    assert sample(logits, [_request(Sampling(temperature=0.0))] * 2) == [Token(0), Token(4)]


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 50])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_own(num_logprobs: int, temperature: float) -> None:
    """Before penalties, bias and temperature; the best in order, equal ones by id."""
    logits = _logits(9, ties=True)
    exact = logits[0].astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    sampling = Sampling(temperature=temperature, seed=4, num_logprobs=num_logprobs, logit_bias=((8, 3.0),), presence_penalty=1.0)
    token = sample(logits.copy(), [_request(sampling, output=[1, 2])])[0]
    assert token.logprob == pytest.approx(exact[token.token_id], abs=1e-9)
    ranked = sorted(range(50), key=lambda i: (-logits[0, i], i))[:num_logprobs]
    assert [each.token_id for each in token.top_logprobs] == ranked
    assert [each.logprob for each in token.top_logprobs] == pytest.approx([exact[i] for i in ranked], abs=1e-9)


def test_a_nucleus_of_nothing_is_the_likeliest() -> None:
    logits = _logits(2)
    assert sample(logits.copy(), [_request(Sampling(top_p=0.0, seed=9))])[0].token_id == logits[0].argmax()


def test_an_empty_step() -> None:
    assert sample(np.empty((0, 10), np.float32), []) == []
