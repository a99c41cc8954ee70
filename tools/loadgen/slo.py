"""What a user was promised, and whether a request kept it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from tools.loadgen.stats import e2e_s, itls_s, tpot_s, ttft_s
from tools.loadgen.stream import OK, Record


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in seconds; None asks nothing. A request is good when it succeeded and kept all of them.

    `itl` bounds the 99th percentile of the request's own gaps, so that one hiccup in a hundred tokens is forgiven and a stream
    that stutters is not; `tpot` bounds their mean. A request that was refused, failed or never sent anything is not good.
    """

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __str__(self) -> str:
        return ",".join(f"{each.name}={value:g}" for each in fields(self) if (value := getattr(self, each.name)) is not None)

    def holds(self, record: Record) -> bool:
        if record.outcome != OK:
            return False
        if self.ttft is not None and ttft_s(record) > self.ttft:
            return False
        if self.e2e is not None and e2e_s(record) > self.e2e:
            return False
        if self.tpot is not None and record.output_tokens > 1 and tpot_s(record) > self.tpot:
            return False
        gaps = itls_s(record)
        return self.itl is None or not len(gaps) or float(np.percentile(gaps, 99)) <= self.itl


def parse_slo(text: str) -> Slo:
    """Read "ttft=1,itl=0.05,e2e=10" (seconds).

    Raises:
        ValueError: it is no such list.
    """
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise ValueError(f"{part!r} is no bound like ttft=1") from None
        if name not in {each.name for each in fields(Slo)} or not 0 < bounds[name] < float("inf"):
            raise ValueError(f"{part!r}: known are ttft, itl, tpot and e2e, each with a positive number of seconds")
    return Slo(**bounds)
