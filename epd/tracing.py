"""Requests as OpenTelemetry traces, sent to a collector over OTLP/HTTP; needs the extra `otlp`.

A request is one span, under the span of the client that it came with (W3C trace context). Below it is one span for everything
that its timeline has: what the gateway and each stage did, with the worker that did it. All are made when the request has ended,
from what stages report anyway: a request costs nothing more while it runs, and without an endpoint nothing at all.

The only place that imports opentelemetry.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from epd.errors import BadConfig
from epd.gateway.history import RequestRecord
from epd.request import GenerateRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_FLUSH_MS = 5000
_TIMEOUT_S = 5.0


class Tracer:
    """Call it with every request that has ended. Spans are sent in batches by a thread of its own, and dropped when the
    collector does not take them.
    """

    def __init__(self, exporter: SpanExporter, *, model: str, wall_clock_ns: Callable[[], int] = time.time_ns) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model = model
        self._now_ns = wall_clock_ns
        self._provider = TracerProvider(resource=Resource.create({"service.name": "epd"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("epd")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, request: GenerateRequest, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        ended_s = record.ended_s or 0.0
        began_ns = self._now_ns() - _ns(ended_s)
        parent = self._propagator.extract({"traceparent": request.traceparent, "tracestate": request.tracestate})
        root = self._tracer.start_span("request", parent, SpanKind.SERVER, self._attributes(record), start_time=began_ns)
        if record.outcome not in ("ok", "cancelled"):
            root.set_status(StatusCode.ERROR, record.outcome)
        below = set_span_in_context(root)
        for part in record.timeline.spans():
            attributes = {"epd.request_id": record.request_id, "epd.stage": part.stage, "epd.worker": part.worker or "gateway"}
            span = self._tracer.start_span(part.name, below, attributes=attributes, start_time=began_ns + _ns(part.start_s))
            if part.name.startswith("failed: "):
                span.set_status(StatusCode.ERROR, part.name.removeprefix("failed: "))
            span.end(began_ns + _ns(max(part.start_s, part.end_s)))
        root.end(began_ns + _ns(ended_s))

    def close(self) -> None:
        """Send what is left; takes as long as the collector takes, within bounds."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def _attributes(self, record: RequestRecord) -> dict[str, str | int | float]:
        """Names are those of the semantic conventions for generative AI where these have one."""
        found: dict[str, str | int | float] = {
            "epd.request_id": record.request_id,
            "epd.outcome": record.outcome,
            "epd.num_images": record.num_images,
            "gen_ai.request.model": self._model,
            "gen_ai.request.choice.count": record.num_choices,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_tokens,
        }
        if record.first_token_s is not None:
            found["gen_ai.server.time_to_first_token"] = record.first_token_s
        return found


def open_tracer(endpoint: str, *, model: str) -> Tracer:
    """Send to a collector's base URL, as in http://127.0.0.1:4318.

    Raises:
        BadConfig: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise BadConfig(f"--otlp-endpoint needs OpenTelemetry ({error}): pip install 'epd[otlp]'") from error
    return Tracer(OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=_TIMEOUT_S), model=model)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
