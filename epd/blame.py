"""Which part of a failed step is to blame: the parts are tried again by halves, until one fails that is alone.

One culprit among n parts costs about 2 * log2(n) steps more, and n of them at most 2 * n. Nothing is tried for ever: a part that
fails alone ends, and each of the others gets on by its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Suspects(Generic[T]):
    """Groups of parts to be tried again, each in a step of its own and with no other step in flight."""

    def __init__(self) -> None:
        self._groups: list[tuple[T, ...]] = []

    def __len__(self) -> int:
        """Groups that are left."""
        return len(self._groups)

    def add(self, parts: Sequence[T]) -> None:
        """Parts of a step that failed, any of which may be to blame."""
        middle = (len(parts) + 1) // 2
        for group in (tuple(parts[middle:]), tuple(parts[:middle])):
            if group:
                self._groups.append(group)

    def next(self, is_there: Callable[[T], bool]) -> tuple[T, ...]:
        """The next group, without the parts that have gone meanwhile; empty when there is none."""
        while self._groups:
            group = tuple(part for part in self._groups.pop() if is_there(part))
            if group:
                return group
        return ()
