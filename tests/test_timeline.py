from __future__ import annotations

from epd.timeline import Timeline, TimelineSpan
from protocol.messages import Span
from tests.support.clock import FakeClock


def test_reported_spans_lie_between_the_ask_and_its_answer() -> None:
    clock = FakeClock()
    timeline = Timeline(clock)
    clock.advance(2.0)
    asked_s = timeline.now()
    clock.advance(5.0)
    timeline.add_reported("prefill", "p0", asked_s, (Span("prefill queue", 0.0, 1.0), Span("prefill", 1.0, 4.5)))
    timeline.add("tokenize", "http", 0.5)
    timeline.add("placement", "gateway", 1.0, 1.5)
    assert timeline.spans() == [
        TimelineSpan("tokenize", "http", "", 0.5, 7.0),
        TimelineSpan("placement", "gateway", "", 1.0, 1.5),
        TimelineSpan("prefill queue", "prefill", "p0", 2.25, 3.25),
        TimelineSpan("prefill", "prefill", "p0", 3.25, 6.75),
    ]
