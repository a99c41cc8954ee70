"""What workers a load needs, for a rate or out of a number of devices, and what gives way first. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from epd.devices import parse_workers, step_limits, tokens_beside_decode, workers_text
from epd.errors import BadConfig
from epd.sizing.predict import Model, Prediction, Predictor, Split, highest_rate, sessions_at

_BRUTE_FORCE = 24  # devices up to which every split is looked at
_EVEN_GAPS = 1.03  # where rates are about the same, decode apart is the better one: its tokens come evenly
GATEWAY_US_PER_TOKEN = 50.0  # CPU time of the gateway, measured with 1,000 streams: docs/sizing.md
GATEWAY_US_PER_REQUEST = 3500.0


@dataclass(frozen=True, slots=True)
class Targets:
    """Nine requests in ten have their first token in time; tokens come at least so fast on average."""

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What workers there are: as `epd cluster --workers` takes them, or "" for a service that is not epd's."""

    name: str
    workers: str
    devices: int
    predict: Predictor


@dataclass(frozen=True, slots=True)
class Service:
    """A shape, at the highest rate that keeps the targets, or at the rate that was asked for."""

    name: str
    workers: str
    devices: int
    highest: float  # requests a second within the targets
    sessions: float  # users at that rate who each wait for their answer before they ask again
    at: Prediction


@dataclass(frozen=True, slots=True)
class Plan:
    """The best shape, the best of each other kind, and what as many devices would do in services that are not disaggregated."""

    answer: Service
    others: tuple[Service, ...]
    next_bottleneck: str
    gateway_cores: float
    kv_bytes_per_s: float  # from prefill to decode, in all, where they are apart
    embedding_bytes_per_s: float  # from encode to prefill, likewise


def plan_rate(model: Model, targets: Targets, rate: float) -> Plan:
    """The fewest devices for a rate.

    Raises:
        BadConfig: no number of devices would keep the targets.
    """
    found = [split_shape(model, smallest(model, targets, rate, with_encode=each)) for each in _with_encode(model)]
    pooled = _smallest_pooled(model, targets, rate, most=max(shape.devices for shape in found))
    found += [pooled] if pooled is not None else []
    answer = min(found, key=lambda shape: shape.devices)
    return _plan(model, targets, answer, [shape for shape in found if shape is not answer], rate)


def plan_devices(model: Model, targets: Targets, devices: int) -> Plan:
    """The use of so many devices that takes the highest rate.

    Raises:
        BadConfig: none keeps the targets.
    """
    found = [pooled_shape(model, devices)]
    for with_encode in _with_encode(model):
        split = best_split(model, targets, devices, with_encode=with_encode)
        found += [split_shape(model, split)] if split is not None else []
    rated = {shape.name: highest_rate(shape.predict, targets.ttft_s, targets.itl_s) for shape in found}
    answer = max(found, key=lambda shape: rated[shape.name] * (1.0 if is_pooled(shape.workers) else _EVEN_GAPS))
    if not rated[answer.name]:
        raise BadConfig(f"{devices} devices do not keep TTFT {targets.ttft_s:g} s and ITL {targets.itl_s:g} s: ask for less")
    return _plan(model, targets, answer, [shape for shape in found if shape is not answer], rated[answer.name])


def is_pooled(workers: str) -> bool:
    """Whether all workers are of one kind, which then has every stage."""
    return bool(workers) and "," not in workers


def split_shape(model: Model, split: Split) -> Shape:
    """Stages apart; without an encode device, but for encode, which is where prefill is."""
    front = "encode+prefill" if model.demand().images and not split.encode else "prefill"
    counts = {"encode": split.encode, front: split.prefill, "decode": split.decode}
    letters = ":".join("".join(stage[0].upper() for stage in kind.split("+")) for kind, count in counts.items() if count)
    numbers = ":".join(str(count) for count in counts.values() if count)
    return Shape(f"{letters} {numbers}", workers_text(counts), split.total, model.apart(split))


def pooled_shape(model: Model, devices: int) -> Shape:
    """Every stage on every device."""
    kind = "encode+prefill+decode" if model.demand().images else "prefill+decode"
    return Shape(f"EPD {devices}", workers_text({kind: devices}), devices, _chunked(model).pooled(devices))


def smallest(model: Model, targets: Targets, rate: float, *, with_encode: bool) -> Split:
    """The fewest devices that keep the targets at a rate. `with_encode`: images have devices of their own.

    Raises:
        BadConfig: no number of devices does.
    """
    need = model.demand()
    front_s = need.prefill_s + (0.0 if with_encode else need.encode_s)
    split = Split(math.ceil(rate * need.encode_s + 1e-9) if with_encode else 0, math.ceil(rate * front_s + 1e-9) or 1, 1)
    split = replace(split, decode=_decode_devices(model, targets, rate))
    while model.apart(split)(rate).ttft_p90_s > targets.ttft_s:
        grown = [replace(split, prefill=split.prefill + _step(split.prefill))]
        if with_encode:
            grown.append(replace(split, encode=split.encode + _step(split.encode)))
        split = min(grown, key=lambda each: model.apart(each)(rate).ttft_p90_s)
        if split.total > 100 * (rate * (need.encode_s + need.prefill_s) + 10):
            best = model.apart(split)(rate).ttft_p90_s
            raise BadConfig(f"no number of devices gives the first token in {targets.ttft_s:g} s: {split} take {best:.3g} s")
    return split


def best_split(model: Model, targets: Targets, devices: int, *, with_encode: bool) -> Split | None:
    """The one that takes the highest rate; None where the devices are too few, or no split keeps the targets."""
    found = _splits(devices, with_encode=with_encode) if devices <= _BRUTE_FORCE else _near(model, targets, devices, with_encode)
    rated = [(highest_rate(model.apart(split), targets.ttft_s, targets.itl_s), split) for split in found]
    rate, split = max(rated, key=lambda each: each[0], default=(0.0, None))
    return split if rate else None


def _with_encode(model: Model) -> tuple[bool, ...]:
    """The kinds of splits that there are: images on devices of their own or not; without images, only the latter."""
    return (True, False) if model.demand().images else (False,)


def _chunked(model: Model) -> Model:
    """With steps that are as short as workers make them beside decode."""
    tokens = tokens_beside_decode(step_limits("cuda"), model.profile.model.active_share)
    return replace(model, steps=replace(model.steps, chunk_tokens=min(tokens, model.steps.chunk_tokens)))


def _plan(model: Model, targets: Targets, answer: Shape, others: list[Shape], rate: float) -> Plan:
    need, profile, devices = model.demand(), model.profile, answer.devices
    baselines = [
        Shape("one service each, prefill first", "", devices, model.together(devices, fused=False)),
        Shape("one service each, chunked", "", devices, _chunked(model).together(devices, fused=True)),
    ]
    best = _service(answer, targets, rate)
    return Plan(
        answer=best,
        others=tuple(_service(shape, targets, rate) for shape in [*others, *baselines]),
        next_bottleneck=_next_bottleneck(model, targets, answer, best.highest),
        gateway_cores=rate * (GATEWAY_US_PER_REQUEST + (need.decode_tokens + 1) * GATEWAY_US_PER_TOKEN) / 1e6,
        kv_bytes_per_s=rate * (need.kv_tokens - need.decode_tokens - 1) * profile.model.kv_token_bytes,
        embedding_bytes_per_s=rate * profile.model.embedding_row_bytes * _embedding_rows(model),
    )


def _service(shape: Shape, targets: Targets, rate: float) -> Service:
    highest = highest_rate(shape.predict, targets.ttft_s, targets.itl_s)
    sessions = sessions_at(shape.predict, targets.ttft_s, targets.itl_s)
    return Service(shape.name, shape.workers, shape.devices, highest, sessions, shape.predict(rate))


def _next_bottleneck(model: Model, targets: Targets, shape: Shape, highest: float) -> str:
    """The kind of worker that one more of would help most, and what breaks first."""
    if not highest:
        return "nothing holds at any rate"
    beyond = shape.predict(highest * 1.01)
    broken = "TTFT" if beyond.ttft_p90_s > targets.ttft_s else "KV memory" if beyond.kv_share > 1 else "ITL"
    counts = parse_workers(shape.workers)
    gains = {
        kind: highest_rate(_with_workers(model, counts | {kind: count + 1}).predict, targets.ttft_s, targets.itl_s)
        for kind, count in counts.items()
    }
    kind, rate = max(gains.items(), key=lambda each: each[1])
    return f"{kind} ({broken} breaks first; one more: +{100 * (rate / highest - 1):.0f} %)"


def _with_workers(model: Model, counts: dict[str, int]) -> Shape:
    if len(counts) == 1:
        return pooled_shape(model, sum(counts.values()))
    prefill = counts.get("prefill", 0) + counts.get("encode+prefill", 0)
    return split_shape(model, Split(counts.get("encode", 0), prefill, counts["decode"]))


def _smallest_pooled(model: Model, targets: Targets, rate: float, *, most: int) -> Shape | None:
    """The fewest devices with every stage that keep the targets, of at most so many."""

    def holds(devices: int) -> bool:
        return pooled_shape(model, devices).predict(rate).holds(targets.ttft_s, targets.itl_s)

    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return pooled_shape(model, high)


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


def _near(model: Model, targets: Targets, devices: int, with_encode: bool) -> list[Split]:
    """For many devices: the largest rate whose smallest split fits, and what is left over given to one stage or another."""

    def fits(rate: float) -> bool:
        try:
            return smallest(model, targets, rate, with_encode=with_encode).total <= devices
        except BadConfig:
            return False

    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, high * 2
    while high > low * 1.002 and high > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        return []
    base = smallest(model, targets, low, with_encode=with_encode)
    left = devices - base.total
    found = [replace(base, prefill=base.prefill + left), replace(base, decode=base.decode + left)]
    return [*found, replace(base, encode=base.encode + left)] if base.encode else found


def _embedding_rows(model: Model) -> float:
    return sum(share * sum(kind.image_tokens) for share, kind in model.workload.shares())


def _step(number: int) -> int:
    """Large tiers grow faster than one by one."""
    return max(1, number // 200)
