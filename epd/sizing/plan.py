"""How many devices of each stage, for a rate or out of a number, and what gives way first. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from epd.errors import BadConfig
from epd.sizing.predict import Model, Prediction, Predictor, Split, highest_rate, sessions_at

_BRUTE_FORCE = 24  # devices up to which every split is looked at
GATEWAY_US_PER_TOKEN = 50.0  # CPU time of the gateway, measured with 1,000 streams: docs/sizing.md
GATEWAY_US_PER_REQUEST = 3500.0


@dataclass(frozen=True, slots=True)
class Targets:
    """Nine requests in ten have their first token in time; tokens come at least so fast on average."""

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """One way to use the devices, at the highest rate that keeps the targets, or at the rate that was asked for."""

    name: str
    devices: int
    highest: float  # requests a second within the targets
    sessions: float  # users at that rate who each wait for their answer before they ask again
    at: Prediction


@dataclass(frozen=True, slots=True)
class Plan:
    """`apart` is the answer; the others are what as many devices would do that each have all stages."""

    split: Split
    apart: Service
    together: tuple[Service, ...]
    next_bottleneck: str
    gateway_cores: float
    kv_bytes_per_s: float  # from prefill to decode, in all
    embedding_bytes_per_s: float  # from encode to prefill, in all


def plan_rate(model: Model, targets: Targets, rate: float) -> Plan:
    """The fewest devices for a rate.

    Raises:
        BadConfig: no number of devices would keep the targets.
    """
    return _plan(model, targets, smallest(model, targets, rate), rate)


def plan_devices(model: Model, targets: Targets, devices: int) -> Plan:
    """The split of so many devices that takes the highest rate.

    Raises:
        BadConfig: they are too few, or no split keeps the targets.
    """
    split = best_split(model, targets, devices)
    rate = highest_rate(model.apart(split), targets.ttft_s, targets.itl_s)
    return _plan(model, targets, split, rate)


def smallest(model: Model, targets: Targets, rate: float) -> Split:
    """The fewest devices that keep the targets at a rate."""
    need = model.demand()
    split = Split(math.ceil(rate * need.encode_s + 1e-9) if need.images else 0, math.ceil(rate * need.prefill_s + 1e-9) or 1, 1)
    split = replace(split, decode=_decode_devices(model, targets, rate))
    while model.apart(split)(rate).ttft_p90_s > targets.ttft_s:
        grown = [replace(split, prefill=split.prefill + _step(split.prefill))]
        if need.images:
            grown.append(replace(split, encode=split.encode + _step(split.encode)))
        split = min(grown, key=lambda each: model.apart(each)(rate).ttft_p90_s)
        if split.total > 100 * (rate * (need.encode_s + need.prefill_s) + 10):
            best = model.apart(split)(rate).ttft_p90_s
            raise BadConfig(f"no number of devices gives the first token in {targets.ttft_s:g} s: {split} take {best:.3g} s")
    return split


def best_split(model: Model, targets: Targets, devices: int) -> Split:
    least = 3 if model.demand().images else 2
    if devices < least:
        raise BadConfig(f"{devices} devices are too few for stages on devices of their own: this workload needs {least}")
    if devices <= _BRUTE_FORCE:
        found = _splits(devices, with_encode=least == 3)
    else:
        found = _near(model, targets, devices)
    rated = [(highest_rate(model.apart(split), targets.ttft_s, targets.itl_s), split) for split in found]
    rate, split = max(rated, key=lambda each: each[0])
    if not rate:
        raise BadConfig(
            f"no split of {devices} devices keeps TTFT {targets.ttft_s:g} s and ITL {targets.itl_s:g} s: ask for less"
        )
    return split


def _plan(model: Model, targets: Targets, split: Split, rate: float) -> Plan:
    need, profile = model.demand(), model.profile
    apart = _service(f"apart {split}", split.total, model.apart(split), targets, rate)
    chunked = replace(model, steps=replace(model.steps, chunk_tokens=min(512, model.steps.chunk_tokens)))
    together = (
        _service("together, prefill first", split.total, model.together(split.total, fused=False), targets, rate),
        _service("together, fused", split.total, chunked.together(split.total, fused=True), targets, rate),
    )
    return Plan(
        split=split,
        apart=apart,
        together=together,
        next_bottleneck=_next_bottleneck(model, targets, split, apart.highest),
        gateway_cores=rate * (GATEWAY_US_PER_REQUEST + (need.decode_tokens + 1) * GATEWAY_US_PER_TOKEN) / 1e6,
        kv_bytes_per_s=rate * (need.kv_tokens - need.decode_tokens - 1) * profile.model.kv_token_bytes,
        embedding_bytes_per_s=rate * profile.model.embedding_row_bytes * _embedding_rows(model),
    )


def _service(name: str, devices: int, predict: Predictor, targets: Targets, rate: float) -> Service:
    highest = highest_rate(predict, targets.ttft_s, targets.itl_s)
    return Service(name, devices, highest, sessions_at(predict, targets.ttft_s, targets.itl_s), predict(rate))


def _next_bottleneck(model: Model, targets: Targets, split: Split, highest: float) -> str:
    """The stage that a further device would help most, and what breaks first."""
    if not highest:
        return "nothing holds at any rate"
    beyond = model.apart(split)(highest * 1.01)
    broken = "TTFT" if beyond.ttft_p90_s > targets.ttft_s else "KV memory" if beyond.kv_share > 1 else "ITL"
    gains = {
        stage: highest_rate(model.apart(replace(split, **{stage: getattr(split, stage) + 1})), targets.ttft_s, targets.itl_s)
        for stage in (("encode", "prefill", "decode") if model.demand().images else ("prefill", "decode"))
    }
    stage, rate = max(gains.items(), key=lambda each: each[1])
    return f"{stage} ({broken} breaks first; one more {stage} device: +{100 * (rate / highest - 1):.0f} %)"


def _decode_devices(model: Model, targets: Targets, rate: float) -> int:
    """The fewest at which tokens come fast enough and their KV fits."""

    need = model.demand()

    def holds(number: int) -> bool:
        _, itl_s, kv_share = model.decode(rate * need.decode_tokens / number, need)
        return itl_s <= targets.itl_s and kv_share <= 1

    high = 1
    while not holds(high):
        high *= 2
        if high > 10**7:
            raise BadConfig(f"no number of devices draws a token every {targets.itl_s:g} s with this workload's context")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _splits(devices: int, *, with_encode: bool) -> list[Split]:
    first = range(1, devices - 1) if with_encode else (0,)
    return [Split(e, p, devices - e - p) for e in first for p in range(1, devices - e)]


def _near(model: Model, targets: Targets, devices: int) -> list[Split]:
    """For many devices: the largest rate whose smallest split fits, and what is left over given to one stage or another."""
    low, high = 0.0, 1.0
    while smallest(model, targets, high).total <= devices:
        low, high = high, high * 2
    while high > low * 1.002:
        middle = (low + high) / 2
        low, high = (middle, high) if smallest(model, targets, middle).total <= devices else (low, middle)
    if not low:
        return []
    base = smallest(model, targets, low)
    left = devices - base.total
    found = [replace(base, prefill=base.prefill + left), replace(base, decode=base.decode + left)]
    return [*found, replace(base, encode=base.encode + left)] if base.encode else found


def _embedding_rows(model: Model) -> float:
    return sum(share * sum(kind.image_tokens) for share, kind in model.workload.shares())


def _step(number: int) -> int:
    """Large tiers grow faster than one by one."""
    return max(1, number // 200)
