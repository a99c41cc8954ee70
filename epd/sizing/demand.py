"""What one request costs each stage of a profiled device, and what a step of many takes. Pure.

Steps are those that the schedulers would make: prompts in chunks, one request after another; decode in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from epd.chunking import ChunkCost
from epd.emulated.cost import TextWork, at, encode_s, preprocess_s, text_s
from epd.emulated.profile import Profile
from epd.sizing.workload import Kind, Workload


@dataclass(frozen=True, slots=True)
class Steps:
    """How large the steps are that workers make."""

    chunk_tokens: int = 2048
    max_running: int = 256


def image_s(profile: Profile, patches: int) -> float:
    """Of device time, for one image; a step of several takes hardly less for each."""
    return encode_s(profile, [patches])


def encoding_s(profile: Profile, kind: Kind) -> float:
    """Time that a request's images take one encode worker: the device, or its host where making patches takes longer."""
    return sum(max(image_s(profile, count), preprocess_s(profile, count)) for count in kind.patches)


def prefill_s(profile: Profile, num_tokens: int, chunk_tokens: int, *, beside: int = 0, context: float = 0.0) -> float:
    """Of a whole prompt in chunks. `beside`: so many sequences with that context draw a token in each step, too."""
    seconds = 0.0
    for start, count in _chunks(chunk_cost(profile, chunk_tokens), num_tokens, chunk_tokens):
        work = TextWork(count + beside, count * start + count * (count + 1) // 2, int(beside * context))
        seconds += text_s(profile, work)
    return seconds


def num_chunks(profile: Profile, num_tokens: int, chunk_tokens: int) -> int:
    return len(_chunks(chunk_cost(profile, chunk_tokens), num_tokens, chunk_tokens))


def chunk_cost(profile: Profile, chunk_tokens: int) -> ChunkCost:
    """What a worker on this device learns that chunks cost."""
    token_s = (at(profile.text.rows, 2 * chunk_tokens) - at(profile.text.rows, chunk_tokens)) / chunk_tokens
    return ChunkCost(profile.text.pair_s / token_s if token_s > 0 else 0.0)


@lru_cache
def _chunks(cost: ChunkCost, num_tokens: int, chunk_tokens: int) -> tuple[tuple[int, int], ...]:
    """(start, tokens) of each chunk of a prompt, cut to take equal time."""
    work = cost.budget(chunk_tokens)
    chunks: list[tuple[int, int]] = []
    start = 0
    while start < num_tokens:
        count = min(num_tokens - start, chunk_tokens, max(1, cost.num_tokens(start, work)))
        chunks.append((start, count))
        start += count
    return tuple(chunks)


def decode_step_s(profile: Profile, batch: float, context: float) -> float:
    """Of one step that draws a token for `batch` sequences (a mean need not be whole) with `context` tokens each on average."""
    return at(profile.text.rows, max(1.0, batch)) + profile.text.context_s * batch * context


def steady_batch(profile: Profile, tokens_per_s: float, context: float, *, share: float = 1.0, most: int) -> float:
    """Sequences that one device has in decode when it is to draw so many tokens a second in `share` of its time: the batch at
    which it does, since a larger one takes longer. Infinity where no batch of up to `most` is enough.
    """
    if tokens_per_s <= 0:
        return 0.0

    def speed(batch: float) -> float:
        return share * batch / decode_step_s(profile, batch, context)

    if share <= 0 or speed(most) < tokens_per_s:
        return float("inf")
    if speed(1.0) >= tokens_per_s:
        return tokens_per_s * decode_step_s(profile, 1.0, context) / share
    low, high = 1.0, float(most)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if speed(middle) < tokens_per_s else (low, middle)
    return high


@dataclass(frozen=True, slots=True)
class Demand:
    """Of a mean request of a workload, in seconds of one device."""

    encode_s: float
    encode_cv2: float  # squared variation from request to request
    prefill_s: float
    prefill_cv2: float
    decode_tokens: float  # drawn by decode: the first one is prefill's
    context: float  # of a sequence in decode, on average over the tokens drawn
    images: float
    kv_tokens: float  # at its end


def demand(profile: Profile, workload: Workload, steps: Steps) -> Demand:
    shares = workload.shares()
    encode = [(share, encoding_s(profile, kind)) for share, kind in shares]
    prefill = [(share, prefill_s(profile, kind.prompt_tokens, steps.chunk_tokens)) for share, kind in shares]
    tokens = sum(share * (kind.output_tokens - 1) for share, kind in shares)
    context = sum(share * (kind.output_tokens - 1) * (kind.prompt_tokens + kind.output_tokens / 2) for share, kind in shares)
    return Demand(
        encode_s=_mean(encode),
        encode_cv2=_cv2(encode),
        prefill_s=_mean(prefill),
        prefill_cv2=_cv2(prefill),
        decode_tokens=tokens,
        context=context / tokens if tokens else 0.0,
        images=sum(share * len(kind.patches) for share, kind in shares),
        kv_tokens=sum(share * (kind.prompt_tokens + kind.output_tokens) for share, kind in shares),
    )


def _mean(values: Sequence[tuple[float, float]]) -> float:
    return sum(share * value for share, value in values)


def _cv2(values: Sequence[tuple[float, float]]) -> float:
    mean = _mean(values)
    return sum(share * (value - mean) ** 2 for share, value in values) / mean**2 if mean else 0.0
