"""One request's time, stage by stage, on one clock: what a waterfall is drawn from.

A stage reports its spans relative to when it received the request, on a clock of its own. Whoever asked knows when the ask left
and when the answer came; what is left of that time, beside the spans, is taken to have gone in equal parts to the way there and
the way back, as NTP does. Does not know: who wants to see it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from epd.clock import Clock, monotonic
from protocol.messages import Span


class TimelineSpan(msgspec.Struct, frozen=True, gc=False):
    """A stretch of a request's time, in seconds since it arrived. Spans overlap wherever stages work side by side."""

    name: str
    stage: str  # "http", "gateway", "encode", "prefill" or "decode"
    worker: str  # empty: this process
    start_s: float
    end_s: float


class Timeline:
    """Begins when it is made."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._arrived = clock()
        self._spans: list[TimelineSpan] = []

    def fork(self) -> Timeline:
        """One that began when this one did and goes on by itself."""
        other = Timeline(self._clock)
        other._arrived, other._spans = self._arrived, list(self._spans)
        return other

    def now(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self._arrived

    def add(self, name: str, stage: str, start_s: float, end_s: float | None = None, *, worker: str = "") -> None:
        """Note a span, which ends now unless `end_s` is given."""
        self._spans.append(TimelineSpan(name, stage, worker, start_s, self.now() if end_s is None else end_s))

    def add_reported(self, stage: str, worker: str, asked_s: float, spans: Iterable[Span]) -> None:
        """Note what a worker reported of an ask that left at `asked_s` and was answered now."""
        spans = tuple(spans)
        on_the_way_s = self.now() - asked_s - max((span.end_s for span in spans), default=0.0)
        received_s = asked_s + max(0.0, on_the_way_s / 2)
        for span in spans:
            self.add(span.name, stage, received_s + span.start_s, received_s + span.end_s, worker=worker)

    def spans(self) -> list[TimelineSpan]:
        """All of them, by when they began."""
        return sorted(self._spans, key=lambda span: (span.start_s, span.end_s))
