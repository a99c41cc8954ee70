"""What the gateway counts, as Prometheus text: its own requests, and the load that the workers report.

Names follow the field's (`ttft`, `itl`, `e2e`), with the unit at the end. One scrape of the gateway shows the whole cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.messages import LinkLoad, StageLoad, WorkerId

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

MemberLoad = tuple[WorkerId, tuple[StageLoad, ...], tuple[LinkLoad, ...]]


class GatewayMetrics:
    """One per gateway, with a registry of its own: two gateways in one process do not meet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("epd_requests", "Requests that have ended, by how", ["outcome"], registry=self._registry)
        self.running = Gauge("epd_requests_running", "Requests that have not ended", registry=self._registry)
        self.prompt_tokens = Counter("epd_prompt_tokens", "Prompt tokens of admitted requests", registry=self._registry)
        self.output_tokens = Counter("epd_output_tokens", "Output tokens sent to clients", registry=self._registry)
        self.images = Counter("epd_images", "Images of admitted requests", registry=self._registry)
        self.ttft = _histogram("epd_ttft_seconds", "First token - arrival", self._registry)
        self.itl = _histogram("epd_itl_seconds", "Gap between two pieces of output of one request", self._registry)
        self.e2e = _histogram("epd_e2e_seconds", "Last token - arrival", self._registry)
        self._cluster = _ClusterCollector()
        self._registry.register(self._cluster)

    def watch(self, arrived: float, num_prompt_tokens: int, num_images: int) -> RequestWatch:
        """Begin to count a request that was admitted."""
        self.running.inc()
        self.prompt_tokens.inc(num_prompt_tokens)
        self.images.inc(num_images)
        return RequestWatch(self, arrived)

    def render(self, members: Iterable[MemberLoad]) -> bytes:
        self._cluster.members = tuple(members)
        text: bytes = generate_latest(self._registry)
        return text


class RequestWatch:
    """Counts one request; the first `finished` is the one that counts."""

    def __init__(self, metrics: GatewayMetrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: float | None = None
        self._is_finished = False

    def delta(self, now: float, num_tokens: int) -> None:
        metrics = self._metrics
        if self._last is None:
            metrics.ttft.observe(now - self._arrived)
        else:
            metrics.itl.observe(now - self._last)
        self._last = now
        metrics.output_tokens.inc(num_tokens)

    def finished(self, now: float, outcome: str) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        self._metrics.running.dec()
        self._metrics.requests.labels(outcome).inc()
        if outcome == "ok":
            self._metrics.e2e.observe(now - self._arrived)


_STAGE_FIGURES = {
    "num_waiting": "Requests that wait",
    "num_running": "Requests in the batch",
    "outstanding_patches": "Image patches not encoded yet",
    "outstanding_tokens": "Prompt tokens not prefilled yet",
    "num_blocks": "Blocks of the pool",
    "num_free_blocks": "Blocks that are free or evictable",
    "num_leases": "Handles held by others",
    "num_cached_blocks": "Blocks with cached content",
    "cache_hits": "Cache look-ups that hit, since start",
    "cache_queries": "Cache look-ups, since start",
    "num_preemptions": "Requests that gave way, since start",
    "busy_s": "Seconds spent in steps, since start",
    "num_steps": "Steps, since start",
    "is_idle_clean": "1 while every integrity check at idle has passed",
}
_LINK_FIGURES = {
    "num_transfers": "Transfers received over the link, since start",
    "num_bytes": "Bytes received over the link, since start",
    "transfer_s": "Seconds of transfers received over the link, since start",
}


class _ClusterCollector(Collector):
    def __init__(self) -> None:
        self.members: tuple[MemberLoad, ...] = ()

    def collect(self) -> Iterator[Metric]:
        for figure, text in _STAGE_FIGURES.items():
            family = GaugeMetricFamily(f"epd_stage_{figure}", text, labels=["worker", "role"])
            for worker, stages, _ in self.members:
                for stage in stages:
                    family.add_metric([worker, stage.role], float(getattr(stage, figure)))
            yield family
        for figure, text in _LINK_FIGURES.items():
            family = GaugeMetricFamily(f"epd_link_{figure}", text, labels=["worker", "peer", "rung"])
            for worker, _, links in self.members:
                for link in links:
                    family.add_metric([worker, link.peer, link.rung], float(getattr(link, figure)))
            yield family


def _histogram(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, buckets=_SECONDS, registry=registry)
