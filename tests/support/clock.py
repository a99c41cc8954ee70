"""A clock that stands still until it is told to move."""

from __future__ import annotations


class FakeClock:
    """Usable wherever an `epd.clock.Clock` is wanted."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        if seconds < 0:
            raise ValueError("a monotonic clock never goes back")
        self.now += seconds
        return self.now
