"""What operators and their tools ask: is the process alive, can it serve, what does it do, what does it look like."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from epd.gateway.engine import Engine
from epd.http.routes import json_response

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HttpMetrics:
    """Counts of this endpoint's own. The engine counts what happens behind it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "epd_http_responses", "Responses, by route and status.", ("route", "status"), registry=self._registry
        )
        self.running = Gauge("epd_http_running_requests", "Generation requests that are being answered.", registry=self._registry)

    def count(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Probes:
    """Handlers of /health, /ready, /metrics and /v1/cluster."""

    def __init__(self, engine: Engine, metrics: HttpMetrics, is_draining: Callable[[], bool]) -> None:
        self._engine = engine
        self._metrics = metrics
        self._is_draining = is_draining

    async def health(self, request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        is_ready, reason = (False, "draining") if self._is_draining() else self._engine.ready()
        body = {"ready": is_ready, "reason": reason}
        return json_response(body, status=200 if is_ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        # On a thread: the text of a large cluster takes a tenth of a second, in which tokens must not wait.
        body = self._metrics.text() + await asyncio.to_thread(self._engine.metrics)
        return web.Response(body=body, headers={"Content-Type": _METRICS_TYPE})

    async def cluster(self, request: web.Request) -> web.Response:
        return json_response(self._engine.cluster())
