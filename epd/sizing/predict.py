"""What a number of devices would do under a load: latencies, how busy each stage is, what fills up. Pure.

Stages apart (a split E:P:D, or EP:D where prefill devices encode, too), every device for every stage (pooled), and two services
that are not disaggregated, where a request stays on one device: prefill first (a whole prompt, with its images, before the next
token of anybody), and fused (prompt chunks and tokens in one step, Sarathi-Serve). Tiers are M/G/c queues with Poisson arrivals;
the batch in decode is the one at which tokens are drawn as fast as they are asked for.
`docs/sizing.md` has the assumptions, and how far emulated runs were from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from epd.emulated.cost import preprocess_s
from epd.emulated.profile import Profile
from epd.sizing.demand import Demand, Steps, decode_step_s, demand, encoding_s, image_s, num_chunks, prefill_s, steady_batch
from epd.sizing.queueing import Wait, quantile, waiting
from epd.sizing.workload import Kind, Workload

_MEMORY_SHARE = 0.9 * 15 / 16  # of the device for weights and KV: what workers take, without the room for embeddings


@dataclass(frozen=True, slots=True)
class Split:
    """Devices of each stage. With none for encode those of prefill encode, too."""

    encode: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.encode + self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.encode}:{self.prefill}:{self.decode}"


@dataclass(frozen=True, slots=True)
class Prediction:
    """At `rate` requests a second. Infinite times: the load is more than the devices can do."""

    rate: float
    ttft_s: float  # mean
    ttft_p90_s: float
    itl_s: float  # mean
    e2e_s: float
    batch: float  # in decode, of one device
    busy: dict[str, float]  # share of time of each tier, 1 and above: cannot keep up
    kv_share: float  # of a decode device's room for KV, held on average

    def holds(self, ttft_s: float, itl_s: float) -> bool:
        return self.ttft_p90_s <= ttft_s and self.itl_s <= itl_s and self.kv_share <= 1.0

    @property
    def bottleneck(self) -> str:
        return max([*self.busy.items(), ("KV memory", self.kv_share)], key=lambda each: each[1])[0]


Predictor = Callable[[float], Prediction]
FirstToken = tuple[float, float, list[Wait]]  # of a kind: its share, its time without others, and where it may wait


@dataclass(frozen=True, slots=True)
class Model:
    """A device and a workload."""

    profile: Profile
    workload: Workload
    steps: Steps

    def demand(self) -> Demand:
        return demand(self.profile, self.workload, self.steps)

    def apart(self, split: Split) -> Predictor:
        """Decode on devices of its own, and encode where it has some."""
        return self._shared_front(split) if self.demand().images and not split.encode else self._apart(split)

    def _apart(self, split: Split) -> Predictor:
        need = self.demand()

        def predict(rate: float) -> Prediction:
            encode = self._encode_wait(rate, need, split.encode)
            prefill = waiting(rate, need.prefill_s, split.prefill, service_cv2=need.prefill_cv2)
            tokens = rate * need.decode_tokens / split.decode if split.decode else math.inf
            batch, itl, _ = self.decode(tokens, need)
            first = [
                (share, _first_token_apart(self.profile, kind, split.encode, self.steps), [encode, prefill][not kind.patches :])
                for share, kind in self.workload.shares()
            ]
            busy = {"encode": _share(rate * need.encode_s, split.encode)} if need.images else {}
            busy["prefill"] = _share(rate * need.prefill_s, split.prefill)
            busy["decode"] = self._decode_busy(tokens, batch, need)
            return self._prediction(rate, first, itl, batch, busy, need)

        return predict

    def _shared_front(self, split: Split) -> Predictor:
        need = self.demand()
        both_s = need.encode_s + need.prefill_s

        def predict(rate: float) -> Prediction:
            wait = waiting(rate, both_s, split.prefill, service_cv2=_both_cv2(need))
            tokens = rate * need.decode_tokens / split.decode if split.decode else math.inf
            batch, itl, _ = self.decode(tokens, need)
            first = self._first_tokens_spread(split.prefill, 0.0, wait)
            busy = {
                "encode+prefill": _share(rate * both_s, split.prefill),
                "decode": self._decode_busy(tokens, batch, need),
            }
            return self._prediction(rate, first, itl, batch, busy, need)

        return predict

    def pooled(self, devices: int) -> Predictor:
        """Every device does everything; images go wherever there is time, prompt chunks and tokens are in one step."""
        return self._fused(devices, is_spread=True)

    def together(self, devices: int, *, fused: bool) -> Predictor:
        """Every device does everything; a request stays on one."""
        return self._fused(devices, is_spread=False) if fused else self._prefill_first(devices)

    def _prefill_first(self, devices: int) -> Predictor:
        need = self.demand()
        whole = Model(self.profile, self.workload, Steps(1 << 30, self.steps.max_running))
        alone = need.encode_s + whole.demand().prefill_s

        def predict(rate: float) -> Prediction:
            each = rate / devices
            left = 1 - each * alone
            tokens = each * need.decode_tokens
            batch = steady_batch(self.profile, tokens, need.context, share=left, most=self.steps.max_running)
            itl = batch / tokens if tokens and batch < math.inf else (0.0 if not tokens else math.inf)
            itl = max(itl, decode_step_s(self.profile, max(1.0, min(batch, 1e9)), need.context)) if batch < math.inf else math.inf
            wait = waiting(rate, alone, devices, service_cv2=_both_cv2(need))
            step = decode_step_s(self.profile, batch, need.context) if batch < math.inf else 0.0
            busy = {"devices": each * alone + (tokens / batch * step if 0 < batch < math.inf else (0.0 if not batch else 1.0))}
            first = self._alone_together(whole.steps, step / 2, wait)
            return self._prediction(rate, first, itl, batch, busy, need)

        return predict

    def _fused(self, devices: int, *, is_spread: bool) -> Predictor:
        need = self.demand()
        chunk = self.steps.chunk_tokens
        chunks = self._mean(lambda kind: float(num_chunks(self.profile, kind.prompt_tokens, chunk)))

        @cache  # a search asks for the same ones again and again
        def prefill(beside: int) -> float:
            """Of a mean prompt, with a token of each of so many sequences in every step."""
            return self._mean(
                lambda kind: prefill_s(self.profile, kind.prompt_tokens, chunk, beside=beside, context=need.context)
            )

        def predict(rate: float) -> Prediction:
            each = rate / devices
            tokens = each * need.decode_tokens

            def drawn(batch: float) -> float:
                """Tokens a second: in steps beside chunks, and in steps of their own in the time that is left."""
                left = 1 - each * (need.encode_s + prefill(round(batch)))
                own = max(0.0, left) / decode_step_s(self.profile, max(1.0, batch), need.context)
                return batch * (each * chunks + own) if left > 0 else 0.0

            batch = _lowest(drawn, tokens, self.steps.max_running)
            grown = prefill(round(batch)) if batch < math.inf else math.inf
            itl = batch / tokens if tokens and batch < math.inf else (0.0 if not tokens else math.inf)
            alone = need.encode_s + grown
            wait = waiting(rate, alone, devices, service_cv2=_both_cv2(need)) if grown < math.inf else Wait(math.inf, 1.0)
            more_s = max(0.0, grown - need.prefill_s)
            if is_spread:
                first = self._first_tokens_spread(devices, more_s, wait)
            else:
                first = self._alone_together(self.steps, more_s, wait)
            left = max(0.0, 1 - each * alone) if grown < math.inf else 0.0
            own = (
                (tokens / batch - each * chunks) * decode_step_s(self.profile, batch, need.context) if 0 < batch < math.inf else 0
            )
            busy = {"devices": each * alone + min(left, max(0.0, own)) if grown < math.inf else math.inf}
            return self._prediction(rate, first, itl, batch, busy, need)

        return predict

    def decode(self, tokens_per_s: float, need: Demand) -> tuple[float, float, float]:
        """Of a decode device that is to draw so many tokens a second: its batch, ITL, and the share of its KV memory in use."""
        batch = steady_batch(self.profile, tokens_per_s, need.context, most=self.steps.max_running)
        itl = decode_step_s(self.profile, batch, need.context) if batch < math.inf else math.inf
        joining = 1 + 0.5 / need.decode_tokens if need.decode_tokens else 1.0  # half a step until it can take part
        return batch, itl * joining, self._kv_share(batch, need)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _encode_wait(self, rate: float, need: Demand, workers: int) -> Wait:
        """A request's images go to as many workers as it has: so many workers together are one server."""
        if not need.images:
            return Wait(0.0, 0.0)
        if not workers:
            return Wait(math.inf, 1.0)
        with_images = [(share, kind) for share, kind in self.workload.shares() if kind.patches]
        share = sum(each for each, _ in with_images)
        width = min(workers, max(1.0, need.images / share))
        servers = max(1, round(workers / width))
        service = need.encode_s / share * servers / workers
        cv2 = max(0.0, share * (need.encode_cv2 + 1) - 1)
        return waiting(rate * share, service, servers, service_cv2=cv2)

    def _alone_together(self, steps: Steps, more_s: float, wait: Wait) -> list[FirstToken]:
        return [
            (share, _first_token_together(self.profile, kind, steps) + more_s, [wait]) for share, kind in self.workload.shares()
        ]

    def _first_tokens_spread(self, devices: int, more_s: float, wait: Wait) -> list[FirstToken]:
        """Where the devices that prefill encode, too, each the images that find it with time."""
        return [
            (share, _first_token_apart(self.profile, kind, devices, self.steps) + more_s, [wait])
            for share, kind in self.workload.shares()
        ]

    def _decode_busy(self, tokens: float, batch: float, need: Demand) -> float:
        if not need.decode_tokens:
            return 0.0
        if batch == math.inf:
            return math.inf
        step = decode_step_s(self.profile, batch, need.context)
        return min(1.0, tokens * step / max(batch, 1e-9))

    def _prediction(
        self, rate: float, first: list[FirstToken], itl: float, batch: float, busy: dict[str, float], need: Demand
    ) -> Prediction:
        ttft = sum(share * (alone + sum(wait.mean_s for wait in waits)) for share, alone, waits in first)
        return Prediction(
            rate=rate,
            ttft_s=ttft,
            ttft_p90_s=math.inf if ttft == math.inf else quantile(0.9, first),
            itl_s=itl,
            e2e_s=ttft + (need.decode_tokens * itl if need.decode_tokens else 0.0),
            batch=batch,
            busy=busy,
            kv_share=self._kv_share(batch, need),
        )

    def _kv_share(self, batch: float, need: Demand) -> float:
        model = self.profile.model
        room = self.profile.memory_bytes * _MEMORY_SHARE - model.weight_bytes
        held = batch * (need.context + need.decode_tokens / 2) * model.kv_token_bytes
        return held / room if room > 0 else math.inf

    def _mean(self, of: Callable[[Kind], float]) -> float:
        return sum(share * of(kind) for share, kind in self.workload.shares())


def highest_rate(predict: Predictor, ttft_s: float, itl_s: float) -> float:
    """The highest rate at which the latencies hold; 0 where they never do. Within 0.1 %."""
    return _highest(lambda rate: predict(rate).holds(ttft_s, itl_s))


def capacity(predict: Predictor) -> float:
    """The rate beyond which the load is more than the devices can do."""
    return _highest(lambda rate: predict(rate).e2e_s < math.inf)


def with_sessions(predict: Predictor, sessions: float) -> Prediction:
    """Under so many users who each send the next request when the last is answered: the rate follows (Little's law)."""
    return predict(_highest(lambda rate: rate * predict(rate).e2e_s <= sessions))


def sessions_at(predict: Predictor, ttft_s: float, itl_s: float) -> float:
    """How many such users there can be before the latencies break."""
    rate = highest_rate(predict, ttft_s, itl_s)
    return rate * predict(rate).e2e_s if rate else 0.0


# --- helpers --------------------------------------------------------------------------------------------------------


def _first_token_apart(profile: Profile, kind: Kind, encode_workers: int, steps: Steps) -> float:
    """Nobody else there: images over the encode workers in turns, each prefilled as soon as it is there and the one before is."""
    prefill = prefill_s(profile, kind.prompt_tokens, steps.chunk_tokens)
    if not kind.patches or not encode_workers:
        return prefill
    second = prefill / kind.prompt_tokens
    copies = profile.copies
    at = 0.0
    for place, (count, tokens) in enumerate(zip(kind.patches, kind.image_tokens, strict=True)):
        turn = place // encode_workers
        made, encoded = preprocess_s(profile, count), image_s(profile, count)
        ready = made + encoded + turn * max(made, encoded)
        ready += copies.latency_s + tokens * profile.model.embedding_row_bytes / copies.bytes_per_s
        at = max(at, ready) + second * tokens
    return at + second * kind.text_tokens


def _first_token_together(profile: Profile, kind: Kind, steps: Steps) -> float:
    """Images one after another, then the prompt, on one device; the next image's file is read meanwhile."""
    prefill = prefill_s(profile, kind.prompt_tokens, steps.chunk_tokens)
    if not kind.patches:
        return prefill
    return preprocess_s(profile, kind.patches[0]) + encoding_s(profile, kind) + prefill


def _both_cv2(need: Demand) -> float:
    """Of encode and prefill one after another, which grow together with the number of images."""
    total = need.encode_s + need.prefill_s
    deviation = need.encode_s * math.sqrt(need.encode_cv2) + need.prefill_s * math.sqrt(need.prefill_cv2)
    return (deviation / total) ** 2 if total else 0.0


def _share(work: float, devices: int) -> float:
    return 0.0 if not work else work / devices if devices else math.inf


def _lowest(speed: Callable[[float], float], wanted: float, most: float) -> float:
    """The smallest batch of at most `most` that is as fast as wanted, or infinity. `speed` rises and may fall again."""
    if wanted <= 0:
        return 0.0
    grid = [most * (place / 64) ** 2 for place in range(1, 65)]
    above = next((batch for batch in grid if speed(batch) >= wanted), math.inf)
    if above == math.inf:
        return math.inf
    low, high = (max((batch for batch in grid if batch < above), default=0.0)), above
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if speed(middle) < wanted else (low, middle)
    return high


def _highest(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1e-3
    if not holds(high):
        return 0.0
    while holds(high):
        low, high = high, high * 2
        if high > 1e9:
            return math.inf
    while high > low * 1.001:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
