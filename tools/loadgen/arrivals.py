"""When requests are due. Pure: numbers in, numbers out.

In an open loop the arrival times are fixed before the first request is sent, so that a slow server cannot slow the load down and
hide its own queue (coordinated omission). A closed loop has no arrival times: a request is due when one before it has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_ARRIVALS = 10_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals per second, going evenly from `start` to `end` over the run."""

    start: float
    end: float

    @property
    def mean(self) -> float:
        return (self.start + self.end) / 2

    def __str__(self) -> str:
        return f"{self.start:g}" if self.start == self.end else f"{self.start:g}:{self.end:g}"


def parse_rate(text: str) -> Rate:
    """Read "5" or "1:20".

    Raises:
        ValueError: it is neither, or one of the rates is not positive.
    """
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{text!r} is neither a positive rate nor a ramp like 1:20")
    return Rate(numbers[0], numbers[-1])


def arrival_times(
    rate: Rate, *, burstiness: float = 1.0, seed: int = 0, num_arrivals: int | None = None, duration_s: float | None = None
) -> list[float]:
    """Seconds after the start at which arrivals are due, ascending.

    `burstiness` is the coefficient of variation of the gaps: 0 spaces them evenly, 1 makes them exponential (a Poisson process),
    more makes them gamma-distributed with clusters and lulls. (The "burstiness" of vLLM's benchmark is a gamma shape, 1 / this
    squared.) A ramp stretches and squeezes the same process, so that its momentary rate follows the line.

    Ends after `num_arrivals` or before `duration_s`, whichever comes first. A ramp needs one of them to know its length.

    Raises:
        ValueError: a number is out of range, or nothing bounds the arrivals.
    """
    if not (rate.start > 0 and rate.end > 0):
        raise ValueError(f"the rate must be positive, not {rate}")
    if not 0 <= burstiness <= 100:
        raise ValueError(f"the burstiness must be from 0 to 100, not {burstiness:g}")
    if num_arrivals is None and duration_s is None:
        raise ValueError("an open loop needs a number of requests or a duration")
    length_s = duration_s if duration_s is not None else (num_arrivals or 0) / rate.mean
    if num_arrivals is None:
        num_arrivals = _enough(rate.mean * length_s, burstiness)
    if num_arrivals > MAX_ARRIVALS:
        raise ValueError(f"{num_arrivals} arrivals are more than {MAX_ARRIVALS}")
    places = np.cumsum(_gaps(num_arrivals, burstiness, np.random.default_rng((seed, 0xA1))))
    times = _stretched(places, rate, length_s)
    return [float(time) for time in times if duration_s is None or time < duration_s]


def _gaps(count: int, burstiness: float, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Gaps of mean 1; the first comes before the first arrival."""
    if burstiness < 1e-3:  # a gamma distribution as narrow as that has no numbers left
        return np.ones(count)
    shape = burstiness**-2
    return rng.gamma(shape, 1.0 / shape, count)


def _enough(expected: float, burstiness: float) -> int:
    """So many arrivals that hardly ever fewer are drawn than the duration has room for."""
    return math.ceil(expected + 8 * max(1.0, burstiness) * math.sqrt(expected + 1)) + 8


def _stretched(
    places: np.ndarray[tuple[int], np.dtype[np.float64]], rate: Rate, length_s: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Times t at which start * t + slope / 2 * t^2, the arrivals expected by then, reach each place; `end` goes on afterwards."""
    if rate.start == rate.end or not length_s:
        return places / rate.start
    slope = (rate.end - rate.start) / length_s
    on_ramp = rate.mean * length_s  # arrivals expected of the whole ramp
    inside = np.minimum(places, on_ramp)
    times = 2 * inside / (rate.start + np.sqrt(np.maximum(0.0, rate.start**2 + 2 * slope * inside)))
    return np.maximum.accumulate(times + (places - inside) / rate.end)  # rounding must not turn the order round
