"""The search for the knee: the highest rate at which enough of the requests are still good.

Pure: says which rate to try next and is told what came of it. Doubles (or halves) the rate until the knee is between two probes,
then halves the logarithmic gap between the highest rate that held and the lowest that did not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Probe:
    rate: float
    good_share: float
    holds: bool


@dataclass(slots=True)
class KneeSearch:
    """Ask `next_rate`, probe it, `tell`; until it answers None. Ends after `max_probes`, or when `precision` is reached."""

    first_rate: float
    threshold: float = 0.9  # share of good requests that must be reached
    max_probes: int = 12
    precision: float = 0.05  # of the rate
    probes: list[Probe] = field(default_factory=list)

    def next_rate(self) -> float | None:
        low, high = self.knee, self.ceiling
        if len(self.probes) >= self.max_probes:
            return None
        if not self.probes:
            return self.first_rate
        if high is None:
            return (low or self.first_rate) * GROWTH
        if low is None:
            return high / GROWTH
        if high <= low * (1 + self.precision):
            return None
        middle = math.sqrt(low * high)
        rounded = float(f"{middle:.3g}")  # easier to read, where that is fine enough
        return rounded if low < rounded < high else middle

    def tell(self, rate: float, good_share: float) -> None:
        self.probes.append(Probe(rate, good_share, good_share >= self.threshold))

    @property
    def knee(self) -> float | None:
        """The highest rate that held, of those below every rate that did not; None: none did."""
        below = [probe.rate for probe in self.probes if probe.holds and (self.ceiling is None or probe.rate < self.ceiling)]
        return max(below, default=None)

    @property
    def ceiling(self) -> float | None:
        """The lowest rate that did not hold; None: all did, and the knee is higher than was tried."""
        return min((probe.rate for probe in self.probes if not probe.holds), default=None)

    @property
    def is_bracketed(self) -> bool:
        """Whether the knee was found between two probes, rather than beyond the last one."""
        return self.knee is not None and self.ceiling is not None
