"""Traces of requests, at a collector of our own on loopback and in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from epd.errors import BadConfig
from epd.gateway.observer import Observer
from epd.metrics import GatewayMetrics
from epd.request import Delta, GenerateRequest
from epd.timeline import Timeline
from epd.tracing import Tracer, open_tracer
from protocol.messages import RequestId, Sampling, Span
from tests.support.clock import FakeClock
from tests.support.collector import Collector

NOW_NS = 1_700_000_000_000_000_000
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def _serve_one(tracer: Tracer, *, outcome: str = "ok", traceparent: str = "") -> None:
    """A request of two seconds, as a gateway's observer hears of it."""
    clock = FakeClock()
    observer = Observer(GatewayMetrics(), clock=clock, trace=tracer)
    timeline = Timeline(clock)
    request = GenerateRequest(RequestId("r1"), (1, 2, 3), (), Sampling(), timeline=timeline, traceparent=traceparent)
    watch = observer.admitted(request, clock())
    timeline.add("placement", "gateway", 0.0, 0.25)
    timeline.add_reported("prefill", "prefill-0", 0.25, [Span("prefill queue", 0.0, 0.25), Span("prefill", 0.25, 0.75)])
    if outcome != "ok":
        timeline.add("failed: peer_lost", "gateway", 0.0, 1.5, worker="decode-0")
    clock.advance(1.0)
    watch.delta(clock(), Delta(0, "a", 1))
    clock.advance(1.0)
    watch.finished(clock(), outcome)


def _in_memory(**options: Any) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, model="tiny-vl", wall_clock_ns=lambda: NOW_NS)
    _serve_one(tracer, **options)
    tracer.close()
    return sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, -(span.end_time or 0)))


def test_a_request_is_a_span_with_its_stages_below() -> None:
    root, *parts = _in_memory()
    assert (root.name, root.parent) == ("request", None)
    assert (root.start_time, root.end_time) == (NOW_NS - 2_000_000_000, NOW_NS)
    attributes = dict(root.attributes or {})
    assert attributes["epd.request_id"] == "r1"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 1
    assert attributes["gen_ai.server.time_to_first_token"] == 1.0
    assert root.status.is_ok or root.status.is_unset
    shown = [
        (part.name, (part.start_time or 0) - (root.start_time or 0), (part.attributes or {})["epd.worker"]) for part in parts
    ]
    assert shown == [
        ("placement", 0, "gateway"),
        ("prefill queue", 250_000_000, "prefill-0"),
        ("prefill", 500_000_000, "prefill-0"),
    ]
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == root.context.span_id
        assert part.context.trace_id == root.context.trace_id
        assert (part.attributes or {})["epd.request_id"] == "r1"


def test_a_clients_trace_goes_on() -> None:
    root = _in_memory(traceparent=f"00-{TRACE}-{PARENT}-01")[0]
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)


def test_a_client_that_wants_no_trace_gets_none() -> None:
    assert _in_memory(traceparent=f"00-{TRACE}-{PARENT}-00") == []


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "\x00" * 500])
def test_a_header_that_is_none_begins_a_trace(header: str) -> None:
    assert _in_memory(traceparent=header)[0].parent is None


def test_what_failed_is_marked() -> None:
    spans = _in_memory(outcome="peer_lost")
    assert {span.name for span in spans if not span.status.is_ok and span.status.description} == {"request", "failed: peer_lost"}


# --- over the wire --------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_traces_reach_a_collector(collector: Collector) -> None:
    tracer = open_tracer(collector.url, model="tiny-vl")
    _serve_one(tracer)
    tracer.close()
    assert collector.paths == ["/v1/traces"]
    assert sorted(collector.names) == ["placement", "prefill", "prefill queue", "request"]


def test_a_collector_that_refuses_harms_nobody(collector: Collector) -> None:
    collector.status = 400
    tracer = open_tracer(collector.url, model="tiny-vl")
    _serve_one(tracer)
    tracer.close()
    assert collector.paths


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadConfig, match=r"epd\[otlp\]"):
        open_tracer("http://127.0.0.1:4318", model="m")


def test_nothing_is_imported_unless_traces_are_sent() -> None:
    program = "import sys, epd.cli, epd.cluster.node; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
