"""How a receiver counts what arrives under credit. Its sender counts the same from the other side, as plain room."""

from __future__ import annotations

from protocol.frames import ProtocolError


class Intake:
    """What arrives under credit: at most `window` untaken; room is given back in halves of the window, not one by one."""

    __slots__ = ("_taken", "_untaken", "_window")

    def __init__(self, window: int) -> None:
        self._window = window
        self._untaken = 0  # arrived, or taken and not yet given back
        self._taken = 0

    def arrive(self, what: str) -> None:
        self._untaken += 1
        if self._untaken > self._window:
            raise ProtocolError("bad_frame", f"more {what} than there was room for")

    def take(self) -> int:
        """Room to give back now."""
        self._taken += 1
        if 2 * self._taken < self._window:
            return 0
        count, self._taken = self._taken, 0
        self._untaken -= count
        return count
