"""When requests are due. Pure: numbers in, numbers out.

In an open loop the arrival times are fixed before the first request is sent, so that a slow server cannot slow the load down and
hide its own queue (coordinated omission). A closed loop has no arrival times: a request is due when one before it has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def poisson_arrivals(
    rate: float, *, seed: int, num_requests: int | None = None, duration_s: float | None = None
) -> Iterator[float]:
    """Seconds after the start at which requests are due: a Poisson process of `rate` requests per second.

    Ends after `num_requests` or before `duration_s`, whichever comes first; at least one of them is given. The gaps, the
    first of which comes before the first request, are exponentially distributed with mean 1 / rate.

    Raises:
        ValueError: the rate is not positive, or nothing bounds the sequence.
    """
    if rate <= 0:
        raise ValueError(f"the rate must be positive, not {rate}")
    if num_requests is None and duration_s is None:
        raise ValueError("an open loop needs a number of requests or a duration")
    return _arrivals(rate, np.random.default_rng((seed, 0xA1)), num_requests, duration_s)


def _arrivals(rate: float, rng: np.random.Generator, num_requests: int | None, duration_s: float | None) -> Iterator[float]:
    due = 0.0
    count = 0
    while num_requests is None or count < num_requests:
        due += float(rng.exponential(1.0 / rate))
        if duration_s is not None and due >= duration_s:
            return
        yield due
        count += 1
