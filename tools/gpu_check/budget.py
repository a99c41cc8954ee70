"""How much time each part may take of what is left. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Callable

LEAST_S = 4.0  # with less than that left nothing is begun


class Budget:
    def __init__(self, total_s: float, clock: Callable[[], float]) -> None:
        self.total_s = total_s
        self._clock = clock
        self._started = clock()

    @property
    def spent_s(self) -> float:
        return self._clock() - self._started

    @property
    def left_s(self) -> float:
        return max(0.0, self.total_s - self.spent_s)

    def grant(self, limit_s: float) -> float:
        """Seconds for a part that may take `limit_s`; 0 when it is not worth beginning."""
        granted = min(limit_s, self.left_s)
        return granted if granted >= min(LEAST_S, limit_s) else 0.0
