"""From logits to tokens on the device: all of `Sampling`, in the order of `epd.model.sampler` and with its meaning.

Only token ids and log probabilities that were asked for come back. The noise of a draw is the host's `uniform(seed, position)`,
and the token is the one at which the distribution function, summed in order of token id, passes it. Weights are summed as whole
numbers (of 2**-bits of the likeliest's), so that the sum does not depend on its order: what a row draws is a function of its
logits and its request, whatever else is in the batch, bit by bit.

Nothing here waits for the device: which rows need what is known from their requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epd.model.device.inputs import Layout, Staging
from epd.model.sampler import GREEDY_BELOW, changes_logits, uniform
from epd.step import SampleRequest

_RUN = 256  # tokens whose weights are summed before the sums are summed
_FEW = 1024  # of up to so many candidates the best are selected; of more, all are sorted
_ID_BITS = 32
# How many rows go through together: so much memory is taken whatever the batch is. With a vocabulary of 152k, 64 rows and their
# weights take 0.2 GiB, and sorting 16 of them 0.15 GiB more.
_DRAWN_TOGETHER, _RANKED_TOGETHER = 64, 16


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What was asked for about some rows, on the device."""

    rows: tuple[int, ...]
    chosen: Tensor  # float64 [n]
    best_ids: Tensor  # int64 [n, k]; a row's own k may be smaller
    best: Tensor  # float64 [n, k]


def is_greedy(requests: Sequence[SampleRequest]) -> bool:
    """Whether all of them want the likeliest token of the logits as they are and nothing else."""
    return all(
        request.sampling.temperature < GREEDY_BELOW and request.sampling.num_logprobs < 0 and not changes_logits(request.sampling)
        for request in requests
    )


@torch.inference_mode()
def sample(logits: Tensor, requests: Sequence[SampleRequest], drawn: Tensor, staging: Staging) -> Logprobs | None:
    """Put the token of row i of logits, float32 [n, vocab_size], into drawn[i], int64 [n].

    The logits are overwritten where penalties, a bias or a guide apply. Output ids that are PENDING count in the noise's position
    only.
    """
    plan = _Plan(requests, logits.shape[1])
    arrays = plan.send(staging)
    raw = logits.index_select(0, arrays["logprob_rows"]) if plan.logprob_rows else None
    if plan.changes.num:
        _change(logits, arrays)
    if plan.allowed:
        _guide(logits, arrays)
    torch.argmax(logits, dim=1, out=drawn)
    if plan.draw_rows:
        drawn.index_copy_(0, arrays["draw_rows"], _draw(logits, plan, arrays))
    if raw is None:
        return None
    return _logprobs(raw, drawn.index_select(0, arrays["logprob_rows"]), plan)


class _Plan:
    """Which rows need what, and the numbers that the device is to be told for it."""

    def __init__(self, requests: Sequence[SampleRequest], vocab_size: int) -> None:
        samplings = [request.sampling for request in requests]
        self.vocab_size = vocab_size
        self.requests = requests
        self.draw_rows = [i for i, sampling in enumerate(samplings) if sampling.temperature >= GREEDY_BELOW]
        self.logprob_rows = [i for i, sampling in enumerate(samplings) if sampling.num_logprobs >= 0]
        self.num_best = min(vocab_size, max((samplings[i].num_logprobs for i in self.logprob_rows), default=0))
        self.allowed = {i: bits for i, request in enumerate(requests) if (bits := request.allowed) is not None}  # by row
        self.changes = _Changes(requests, vocab_size)
        drawing = [samplings[i] for i in self.draw_rows]
        self.has_min_p = any(sampling.min_p > 0.0 for sampling in drawing)
        # Places among draw_rows, and for each how many candidates there are at most.
        limits = {
            place: sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
            for place, sampling in enumerate(drawing)
            if sampling.top_p < 1.0 or 0 < sampling.top_k < vocab_size
        }
        self.ranked = {
            "few": [place for place, limit in limits.items() if limit <= _FEW],
            "many": [place for place, limit in limits.items() if limit > _FEW],
        }
        self.limits = limits

    def send(self, staging: Staging) -> dict[str, Tensor]:
        samplings = [request.sampling for request in self.requests]
        drawing = [samplings[i] for i in self.draw_rows]
        noise = [uniform(samplings[i].seed, len(self.requests[i].output_token_ids)) for i in self.draw_rows]
        values: dict[str, tuple[torch.dtype, Sequence[float]]] = {
            "logprob_rows": (torch.int64, self.logprob_rows),
            "guided_rows": (torch.int64, list(self.allowed)),
            "draw_rows": (torch.int64, self.draw_rows),
            "coldness": (torch.float32, [1.0 / sampling.temperature for sampling in drawing]),
            "noise": (torch.float64, noise),
            "min_p": (torch.float64, [sampling.min_p for sampling in drawing]),
            "change_at": (torch.int64, self.changes.at),
            "change_factor": (torch.float32, self.changes.factor),
            "change_less": (torch.float32, self.changes.less),
            "change_more": (torch.float32, self.changes.more),
        }
        for name, places in self.ranked.items():
            values[f"{name}_places"] = (torch.int64, places)
            values[f"{name}_limit"] = (torch.int64, [self.limits[place] for place in places])
            values[f"{name}_top_p"] = (torch.float64, [max(drawing[place].top_p, 1e-9) for place in places])
        layout = {name: (dtype, (len(numbers),)) for name, (dtype, numbers) in values.items()}
        staged = staging.begin(Layout({**layout, "allowed": (torch.int32, (len(self.allowed), -(-self.vocab_size // 32)))}))
        for name, (_, numbers) in values.items():
            staged[name][:] = numbers
        for place, bits in enumerate(self.allowed.values()):
            staged["allowed"][place] = bits
        return staging.send(staged)


class _Changes:
    """Penalties and biases as sparse updates: logit at[i] of all rows in one line becomes f(logit) - less[i] + more[i]."""

    def __init__(self, requests: Sequence[SampleRequest], vocab_size: int) -> None:
        self.at: list[int] = []
        self.factor: list[float] = []  # of the repetition penalty: divides what is positive, multiplies what is not
        self.less: list[float] = []
        self.more: list[float] = []
        for row, request in enumerate(requests):
            if changes_logits(request.sampling):
                self._add(row * vocab_size, request)

    @property
    def num(self) -> int:
        return len(self.at)

    def _add(self, start: int, request: SampleRequest) -> None:
        """Repetition over prompt and output (Keskar et al., arXiv 1909.05858); frequency and presence over output; the bias."""
        sampling, output = request.sampling, request.output_token_ids
        factor: dict[int, float] = {}
        less: dict[int, float] = {}
        more: dict[int, float] = {}
        if sampling.repetition_penalty != 1.0:
            seen = np.unique(np.concatenate([request.prompt_token_ids, output]))
            factor = dict.fromkeys(seen.tolist(), sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token_id, count in zip(*(each.tolist() for each in np.unique(output, return_counts=True)), strict=True):
                less[token_id] = float(
                    np.float32(sampling.frequency_penalty) * np.float32(count) + np.float32(sampling.presence_penalty)
                )
        for token_id, bias in sampling.logit_bias:
            more[token_id] = more.get(token_id, 0.0) + bias
        for token_id in sorted({*factor, *less, *more}):
            self.at.append(start + token_id)
            self.factor.append(factor.get(token_id, 1.0))
            self.less.append(less.get(token_id, 0.0))
            self.more.append(more.get(token_id, 0.0))


def _change(logits: Tensor, arrays: dict[str, Tensor]) -> None:
    at, factor = arrays["change_at"], arrays["change_factor"]
    flat = logits.view(-1)
    values = flat.index_select(0, at)
    values = torch.where(values > 0, values / factor, values * factor) - arrays["change_less"] + arrays["change_more"]
    flat.index_copy_(0, at, values)


def _guide(logits: Tensor, arrays: dict[str, Tensor]) -> None:
    """Nothing that a guide does not allow can be drawn: its logit is -inf."""
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    for first in range(0, len(arrays["guided_rows"]), _RANKED_TOGETHER):
        part = slice(first, first + _RANKED_TOGETHER)
        rows, allowed = arrays["guided_rows"][part], arrays["allowed"][part]
        bits = ((allowed[:, :, None] >> places) & 1).view(len(rows), -1)[:, : logits.shape[1]]
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(bits == 0, float("-inf")))


def _draw(logits: Tensor, plan: _Plan, arrays: dict[str, Tensor]) -> Tensor:
    """int64 [number of draw_rows]"""
    num_rows = len(plan.draw_rows)
    groups = [range(first, min(first + _DRAWN_TOGETHER, num_rows)) for first in range(0, num_rows, _DRAWN_TOGETHER)]
    return torch.cat([_draw_group(logits, group, plan, arrays) for group in groups])


def _draw_group(logits: Tensor, group: range, plan: _Plan, arrays: dict[str, Tensor]) -> Tensor:
    part = slice(group.start, group.stop)
    values = logits.index_select(0, arrays["draw_rows"][part])
    bits = 62 - (plan.vocab_size - 1).bit_length()  # the sum of all weights stays below 2**63
    weights = _weights(values, arrays["coldness"][part], bits)
    for name, places in plan.ranked.items():
        start, end = bisect_left(places, group.start), bisect_left(places, group.stop)
        for first in range(start, end, _RANKED_TOGETHER):
            some = slice(first, min(first + _RANKED_TOGETHER, end))
            at, limit = arrays[f"{name}_places"][some] - group.start, arrays[f"{name}_limit"][some]
            best = _best_ids(values.index_select(0, at), max(plan.limits[place] for place in places[some]))
            kept = _nucleus(weights.index_select(0, at), best, limit, arrays[f"{name}_top_p"][some])
            weights.index_copy_(0, at, kept)
    if plan.has_min_p:
        least = (arrays["min_p"][part] * 2.0**bits).ceil().to(torch.int64)
        weights.masked_fill_(weights < least[:, None], 0)
    return _passing(weights, arrays["noise"][part]).clamp_(max=plan.vocab_size - 1)


def _weights(values: Tensor, coldness: Tensor, bits: int) -> Tensor:
    """exp(value / temperature) of each row as whole numbers, the likeliest's 2**bits: int64 [n, vocab_size up to whole runs]."""
    num_rows, vocab_size = values.shape
    powers = (values - values.amax(dim=1, keepdim=True)).mul_(coldness[:, None]).exp_().mul_(2.0**bits)
    weights = torch.zeros(num_rows, -(-vocab_size // _RUN) * _RUN, dtype=torch.int64, device=values.device)
    weights[:, :vocab_size] = powers
    return weights


def _best_ids(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` highest of each row, from the highest on, equal ones by lower id: int64 [n, count]."""
    if count > _FEW:
        return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count]
    # One number per token that orders by value, then by id: all differ, so that which are selected is no accident.
    bits = (values + 0.0).view(torch.int32)  # no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = (1 << _ID_BITS) - 1
    ids = torch.arange(values.shape[1], device=values.device)
    keys = (ordered.to(torch.int64) << _ID_BITS) | (last - ids)
    return last - (torch.topk(keys, count, dim=1).values & last)


def _nucleus(weights: Tensor, best: Tensor, limit: Tensor, top_p: Tensor) -> Tensor:
    """`weights` where they are among the first `limit` of `best` and the fewest that reach `top_p` of those; 0 elsewhere.

    Nucleus: Holtzman et al., arXiv 1904.09751.
    """
    ranked = weights.gather(1, best)
    ranked.masked_fill_(torch.arange(best.shape[1], device=best.device) >= limit[:, None], 0)
    reached = ranked.cumsum(dim=1)
    before = (reached - ranked).to(torch.float64)
    bound = top_p * reached[:, -1].to(torch.float64)
    # A nucleus of all is no bound, not even to a token whose weight is 0 in the sum.
    ranked.masked_fill_((before >= bound[:, None]) & (top_p < 1.0)[:, None], 0)
    return torch.zeros_like(weights).scatter_(1, best, ranked)


def _passing(weights: Tensor, noise: Tensor) -> Tensor:
    """The first place of each row at which the sum of weights passes `noise` of the whole."""
    runs = weights.view(len(weights), -1, _RUN)
    sums = runs.sum(dim=2)
    ends = sums.cumsum(dim=1)
    total = ends[:, -1]
    target = torch.minimum((noise * total.to(torch.float64)).to(torch.int64), total - 1)[:, None]
    run = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    left = target - (ends.gather(1, run) - sums.gather(1, run))
    inside = runs.gather(1, run[:, :, None].expand(-1, -1, _RUN)).squeeze(1).cumsum(dim=1)
    place = torch.searchsorted(inside, left, right=True).clamp_(max=_RUN - 1)
    return (run * _RUN + place).squeeze(1)


def _logprobs(raw: Tensor, drawn: Tensor, plan: _Plan) -> Logprobs:
    """The model's own, before penalties, bias and temperature."""
    parts = []
    for first in range(0, len(raw), _RANKED_TOGETHER):
        part = slice(first, first + _RANKED_TOGETHER)
        values = torch.log_softmax(raw[part].to(torch.float64), dim=1)
        best_ids = _best_ids(raw[part], plan.num_best)
        parts.append((values.gather(1, drawn[part, None]).squeeze(1), best_ids, values.gather(1, best_ids)))
    chosen, best_ids, best = (torch.cat(each) for each in zip(*parts, strict=True))
    return Logprobs(tuple(plan.logprob_rows), chosen, best_ids, best)
