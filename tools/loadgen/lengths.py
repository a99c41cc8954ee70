"""How long things are: a fixed length, a range, or a lognormal distribution. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers in [low, high]: drawn uniformly, or lognormally around `mean` with a deviation `sigma` of the logarithm."""

    low: int
    high: int
    mean: float = 0.0  # of the lognormal distribution, before it is cut to [low, high]; 0: uniform
    sigma: float = 0.0

    def draw(self, rng: np.random.Generator) -> int:
        if not self.mean:
            return int(rng.integers(self.low, self.high + 1))
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return int(min(max(round(drawn), self.low), self.high))

    def __str__(self) -> str:
        if self.mean:
            return f"lognormal:{self.mean:g}:{self.sigma:g}:{self.high}"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def parse_lengths(text: str) -> Lengths:
    """Read "32", "16-64", "lognormal:MEAN:SIGMA" or "lognormal:MEAN:SIGMA:MAX" (MAX: 16 times the mean if not given).

    Raises:
        ValueError: it is none of these.
    """
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high:
            raise ValueError(f"{text!r}: a range goes upwards from at least 1")
        return Lengths(low, high)
    kind, *numbers = text.split(":")
    if kind != "lognormal" or len(numbers) not in (2, 3):
        raise ValueError(f"{text!r} is neither a number, nor a range like 16-64, nor lognormal:MEAN:SIGMA[:MAX]")
    try:
        mean, sigma = float(numbers[0]), float(numbers[1])
        high = int(numbers[2]) if len(numbers) == 3 else math.ceil(16 * mean)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r}: lognormal takes numbers, as in lognormal:200:0.8:2000") from None
    if not (1 <= mean <= high and 0 <= sigma <= 5):
        raise ValueError(f"{text!r}: the mean lies between 1 and the maximum, sigma between 0 and 5")
    return Lengths(1, high, mean, sigma)
