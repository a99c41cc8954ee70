"""Results that come later: what a call on a stream may return while the device is still at its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")


class Deferred(ABC, Generic[T]):
    """What a call may return in place of its value while the device is still at its work."""

    @abstractmethod
    def value(self) -> T:
        """Called once, when the device has passed the point at which the call returned."""


Now: TypeAlias = T | Deferred[T]
"""A value, or what will give it once the device has come so far."""
