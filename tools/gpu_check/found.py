"""What a part may come by, beside rows. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from tools.bench.rows import Row


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can do, as this run measured it."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    read_bytes_per_s: float
    flop_per_s: float  # of a large product of matrices in the model's dtype


@dataclass(frozen=True, slots=True)
class Missing:
    """A figure that there is none of, and why. The part goes on."""

    name: str
    reason: str


Found: TypeAlias = Row | Missing | Limits
Figures: TypeAlias = Iterator[Found]
