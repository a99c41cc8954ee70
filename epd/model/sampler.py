"""From logits to tokens: all of `Sampling`, in the order penalties, bias, guide, temperature, top_k, top_p, min_p, draw.

The draw of output token number n is a function of (seed, n) and the logits, not of a generator's state: a request that moves to
another worker, or is prefilled again, goes on with the same tokens. Log probabilities are the model's own, before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epd.step import SampleRequest
from gpu.kernels.draw_token import draw_token
from protocol.messages import Sampling, Token, TokenLogprob

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

GREEDY_BELOW = 1e-5  # temperatures below this take the likeliest token
_MASK = (1 << 64) - 1
_NUM_BUCKETS, _BUCKETS_PER_UNIT = 2048, 64.0  # down to e**-32 of the likeliest; what is below is in the last bucket


def sample(logits: FloatArray, requests: Sequence[SampleRequest]) -> list[Token]:
    """One token per row of logits [num_requests, vocab_size], which are overwritten where penalties, a bias or a guide apply."""
    if all(_is_plain(request.sampling) for request in requests):
        return [Token(token_id) for token_id in logits.argmax(axis=1).tolist()]
    return [_sample_row(row, request) for row, request in zip(logits, requests, strict=True)]


def uniform(seed: int, position: int) -> float:
    """The noise of one token, uniform in [0, 1): two rounds of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return (_mix(_mix(seed & _MASK) + position) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW and sampling.num_logprobs < 0 and not changes_logits(sampling)


def changes_logits(sampling: Sampling) -> bool:
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.logit_bias
        or sampling.guide
    )


def _sample_row(row: FloatArray, request: SampleRequest) -> Token:
    sampling = request.sampling
    raw = row.copy() if sampling.num_logprobs >= 0 and changes_logits(sampling) else row
    if changes_logits(sampling):
        _penalize(row, request)
    if sampling.temperature < GREEDY_BELOW:
        token_id = int(row.argmax())
    else:
        token_id = _draw(row, sampling, uniform(sampling.seed, len(request.output_token_ids)))
    if sampling.num_logprobs < 0:
        return Token(token_id)
    return _with_logprobs(token_id, raw, sampling.num_logprobs)


def _penalize(row: FloatArray, request: SampleRequest) -> None:
    """Repetition over prompt and output (Keskar et al., arXiv 1909.05858); frequency and presence over output; bias; guide."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([request.prompt_token_ids, request.output_token_ids]))
        factor = np.float32(sampling.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
    if (sampling.frequency_penalty or sampling.presence_penalty) and len(request.output_token_ids):
        seen, counts = np.unique(request.output_token_ids, return_counts=True)
        row[seen] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32) + np.float32(sampling.presence_penalty)
    for token_id, bias in sampling.logit_bias:
        row[token_id] += np.float32(bias)
    if request.allowed is not None:
        bits = np.unpackbits(request.allowed.view(np.uint8), count=len(row), bitorder="little")
        row[bits == 0] = -np.inf


def _draw(row: FloatArray, sampling: Sampling, noise: float) -> int:
    """The token at which the distribution function, summed in order of token id, passes `noise`."""
    has_top_k = 0 < sampling.top_k < len(row)
    if sampling.top_p >= 1.0 and sampling.min_p <= 0.0 and not has_top_k:
        return draw_token(row, sampling.temperature, noise)
    ids = np.sort(_best(row, sampling.top_k)) if has_top_k else np.arange(len(row))
    depths = (row.max() - row[ids]).astype(np.float64) / sampling.temperature  # below the likeliest
    weights = np.exp(-depths)
    if sampling.top_p < 1.0:
        kept = _nucleus(depths, weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(weights >= sampling.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    sums = np.cumsum(weights)
    return int(ids[min(int(np.searchsorted(sums, noise * sums[-1], side="right")), len(sums) - 1)])


def _nucleus(depths: Float64Array, weights: Float64Array, top_p: float) -> IntArray:
    """Places, rising, of the fewest highest weights that reach top_p of the whole (Holtzman et al., arXiv 1904.09751).

    What is above and below is told by buckets of depth; only the bucket in which the bound lies has to be sorted.
    """
    buckets = np.minimum(depths * _BUCKETS_PER_UNIT, _NUM_BUCKETS - 1).astype(np.intp)
    sums = np.bincount(buckets, weights, _NUM_BUCKETS)
    reached = np.cumsum(sums)
    bound = max(top_p, 1e-9) * float(reached[-1])  # the likeliest is always in
    edge = min(int(np.searchsorted(reached, bound)), int(buckets.max()))
    inside = np.flatnonzero(buckets == edge)
    inside = inside[np.argsort(depths[inside], kind="stable")]
    before = reached[edge] - sums[edge] + np.cumsum(weights[inside]) - weights[inside]
    return np.sort(np.concatenate([np.flatnonzero(buckets < edge), inside[before < bound]]))


def _best(row: FloatArray, count: int) -> IntArray:
    """Ids of the `count` highest, equal ones by lower id; in no particular order."""
    if count >= len(row):
        return np.arange(len(row))
    bound = np.partition(row, len(row) - count)[len(row) - count]
    above = np.flatnonzero(row > bound)
    return np.concatenate([above, np.flatnonzero(row == bound)[: count - len(above)]])


def _with_logprobs(token_id: int, raw: FloatArray, num_best: int) -> Token:
    values = raw.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = _best(raw, num_best) if num_best else np.empty(0, np.intp)
    best = best[np.lexsort((best, -raw[best]))]
    return Token(
        token_id,
        logprob=float(values[token_id]),
        top_logprobs=tuple(TokenLogprob(int(i), float(values[i])) for i in best),
    )
