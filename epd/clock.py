"""Time as the product reads it: one monotonic clock that tests can replace."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since an arbitrary start; never goes back."""

monotonic: Clock = time.monotonic
