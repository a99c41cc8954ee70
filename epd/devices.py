"""What `--device` may say, and how the processes of a cluster share the devices that it names.

Pure: whether a device is there is for the backend to find out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd.errors import BadConfig

_ONE = re.compile(r"cpu|cuda(:\d+)?|emulated:.+")
_SHARES = {"encode": 1, "prefill": 3, "decode": 4}  # of a device's memory: an encode worker keeps embeddings only for a moment


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How much one step takes on, where the operator does not say."""

    token_budget: int
    max_chunk_tokens: int
    max_running: int
    max_patches: int


# A processor is busy with little; a GPU needs thousands of rows to be. A 1080p image is 8,160 patches: with more of them in a
# step, the first of a request waits for all, and prefill for it.
_ON_CPU = StepLimits(token_budget=2048, max_chunk_tokens=512, max_running=64, max_patches=16_384)
_ON_GPU = StepLimits(token_budget=8192, max_chunk_tokens=2048, max_running=256, max_patches=8192)


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


def step_limits(device: str) -> StepLimits:
    return _ON_CPU if device == "cpu" else _ON_GPU


def seats(devices: str, counts: Mapping[str, int], memory_fraction: float) -> dict[str, tuple[Seat, ...]]:
    """The seats of a cluster's workers by role, which `counts` has in the order encode, prefill, decode.

    `devices` names one device for all, one for each stage, or one for each worker. Workers on one CUDA device share out
    `memory_fraction` of its memory among them; on a host each sizes itself by what is free.

    Raises:
        BadConfig: another number of devices, or one that is none.
    """
    named = [check_device(each.strip()) for each in devices.split(",")]
    roles = [role for role, count in counts.items() for _ in range(count)]
    if len(named) == 1:
        placed = named * len(roles)
    elif len(named) == len(counts):
        by_role = dict(zip(counts, named, strict=True))
        placed = [by_role[role] for role in roles]
    elif len(named) == len(roles):
        placed = named
    else:
        raise BadConfig(
            f"--device names {len(named)} devices: name one, or one for each stage ({len(counts)}), "
            f"or one for each worker ({len(roles)})"
        )
    fractions = _fractions(roles, placed, memory_fraction)
    return {
        role: tuple(Seat(device, share) for each, device, share in zip(roles, placed, fractions, strict=True) if each == role)
        for role in counts
    }


def _fractions(roles: Sequence[str], placed: Sequence[str], memory_fraction: float) -> list[float]:
    total: dict[str, int] = {}
    for role, device in zip(roles, placed, strict=True):
        total[device] = total.get(device, 0) + _SHARES[role]
    return [
        round(memory_fraction * _SHARES[role] / total[device], 4) if device.startswith("cuda") else memory_fraction
        for role, device in zip(roles, placed, strict=True)
    ]
