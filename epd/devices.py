"""Which workers a cluster has, what `--device` may say, and how the workers share the devices that it names.

A kind of worker is written as the stages that it has: "encode", "encode+prefill", "encode+prefill+decode".

Pure: whether a device is there is for the backend to find out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd.errors import BadConfig

_ONE = re.compile(r"cpu|cuda(:\d+)?|emulated:.+")
_STAGES = ("encode", "prefill", "decode")
_SHARES = {"encode": 1, "prefill": 3, "decode": 4}  # of a device's memory: an encode worker keeps embeddings only for a moment


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How much one step takes on, where the operator does not say."""

    token_budget: int
    budget_beside_decode: int
    max_chunk_tokens: int
    max_running: int
    max_patches: int


# A processor is busy with little; a GPU needs thousands of rows to be. A 1080p image is 8,160 patches: with more of them in a
# step, the first of a request waits for all, and prefill for it. Beside decode a step of prefill is what the next token waits for
# on a GPU (512: as in Sarathi-Serve, arXiv 2403.02310); stages of one process on a host have threads of their own.
_ON_CPU = StepLimits(token_budget=2048, budget_beside_decode=2048, max_chunk_tokens=512, max_running=64, max_patches=16_384)
_ON_GPU = StepLimits(token_budget=8192, budget_beside_decode=512, max_chunk_tokens=2048, max_running=256, max_patches=8192)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker of a cluster runs, and which share of that device's memory it may take."""

    device: str
    memory_fraction: float


def check_device(text: str) -> str:
    """One device: cpu, cuda, cuda:N or emulated:PROFILE. Raises BadConfig."""
    if not _ONE.fullmatch(text):
        raise BadConfig(f"--device {text}: choose cpu, cuda, cuda:N or emulated:PROFILE")
    return "cuda:0" if text == "cuda" else text


def parse_workers(text: str) -> dict[str, int]:
    """Kinds of workers and how many of each, as in encode+prefill:7,decode:1. Raises BadConfig."""
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, _, number = part.partition(":")
        named = [stage.strip() for stage in kind.split("+")]
        if not set(named) <= set(_STAGES) or len(set(named)) < len(named) or not number.strip().isdecimal() or not int(number):
            raise BadConfig(f"--workers {text}: expected STAGE[+STAGE...]:NUMBER[,...], as in encode+prefill:7,decode:1")
        kind = "+".join(stage for stage in _STAGES if stage in named)
        found[kind] = found.get(kind, 0) + int(number)
    missing = {"prefill", "decode"} - {stage for kind in found for stage in kind.split("+")}
    if missing:
        raise BadConfig(f"--workers {text}: nobody has the stage {' and '.join(sorted(missing))}, which every request needs")
    return found


def workers_text(counts: Mapping[str, int]) -> str:
    """As `parse_workers` reads it."""
    return ",".join(f"{kind}:{number}" for kind, number in counts.items() if number)


def step_limits(device: str) -> StepLimits:
    return _ON_CPU if device == "cpu" else _ON_GPU


def tokens_beside_decode(limits: StepLimits, active_share: float) -> int:
    """What `budget_beside_decode` is for a model of whose weights a token uses that share.

    Some hundred tokens have all experts read, and make little use of each: with as few as suit a dense model, reading is all that
    a step does, and one with several times as many takes hardly longer.
    """
    return max(limits.budget_beside_decode, min(limits.max_chunk_tokens, round(limits.budget_beside_decode / active_share)))


def seats(devices: str, counts: Mapping[str, int], memory_fraction: float) -> dict[str, tuple[Seat, ...]]:
    """The seats of a cluster's workers by kind, in the order of `counts`.

    `devices` names one device for all, one for each kind, or one for each worker. Workers on one CUDA device share out
    `memory_fraction` of its memory among them; on a host each sizes itself by what is free.

    Raises:
        BadConfig: another number of devices, or one that is none.
    """
    named = [check_device(each.strip()) for each in devices.split(",")]
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    if len(named) == 1:
        placed = named * len(kinds)
    elif len(named) == len(counts):
        by_kind = dict(zip(counts, named, strict=True))
        placed = [by_kind[kind] for kind in kinds]
    elif len(named) == len(kinds):
        placed = named
    else:
        raise BadConfig(
            f"--device names {len(named)} devices: name one, or one for each kind of worker ({len(counts)}), "
            f"or one for each worker ({len(kinds)})"
        )
    fractions = _fractions(kinds, placed, memory_fraction)
    return {
        kind: tuple(Seat(device, share) for each, device, share in zip(kinds, placed, fractions, strict=True) if each == kind)
        for kind in counts
    }


def _fractions(kinds: Sequence[str], placed: Sequence[str], memory_fraction: float) -> list[float]:
    shares = [sum(_SHARES[stage] for stage in kind.split("+")) for kind in kinds]
    total: dict[str, int] = {}
    for share, device in zip(shares, placed, strict=True):
        total[device] = total.get(device, 0) + share
    return [
        round(memory_fraction * share / total[device], 4) if device.startswith("cuda") else memory_fraction
        for share, device in zip(shares, placed, strict=True)
    ]
