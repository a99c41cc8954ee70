"""Waiting lines. Pure.

M/G/c by Allen and Cunneen's approximation: Erlang's C formula for M/M/c, times half of (squared variation of arrivals plus that
of service times). Exact for M/M/c and, with one server, for M/G/1 (Pollaczek-Khinchine).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wait:
    """Time in line: with `chance` there is any, and then it is about exponential."""

    mean_s: float
    chance: float

    @property
    def variance(self) -> float:
        if not self.chance or math.isinf(self.mean_s):
            return self.mean_s
        return 2 * self.mean_s**2 / self.chance - self.mean_s**2


def waiting(rate: float, service_s: float, servers: int, *, service_cv2: float = 0.0, arrival_cv2: float = 1.0) -> Wait:
    """Of jobs that come `rate` a second and take `service_s` each on one of `servers`; for ever, where these do not keep up."""
    load = rate * service_s
    if load <= 0:
        return Wait(0.0, 0.0)
    if load >= servers:
        return Wait(math.inf, 1.0)
    chance = erlang_c(load, servers)
    return Wait(chance * service_s / (servers - load) * (arrival_cv2 + service_cv2) / 2, chance)


def erlang_c(load: float, servers: int) -> float:
    """Chance that a job finds all of `servers` busy, with `load` of them busy on average; by the recursion of Erlang's B."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def quantile(share: float, kinds: Sequence[tuple[float, float, Sequence[Wait]]]) -> float:
    """Of times that are, for each kind of (its share, a constant, waits), the constant and its waits one after another; their sum
    as if it were normal, and never below nothing.
    """

    def below(time_s: float) -> float:
        return sum(weight * _share_below(time_s - constant, waits) for weight, constant, waits in kinds)

    low, high = 0.0, 1e-3
    while below(high) < share:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return high


def _share_below(time_s: float, waits: Sequence[Wait]) -> float:
    if time_s < 0:
        return 0.0
    mean, deviation = sum(wait.mean_s for wait in waits), math.sqrt(sum(wait.variance for wait in waits))
    if deviation == 0:
        return float(time_s >= mean)
    return 0.5 * (1 + math.erf((time_s - mean) / (deviation * math.sqrt(2))))
