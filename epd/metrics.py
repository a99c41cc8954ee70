"""What the gateway counts of its own requests and of the cluster's faults, as Prometheus text with the load that workers report.

One scrape of the gateway shows the whole cluster: `epd.exposition` turns the last load reports into metrics. Names follow the
field's (vLLM's, SGLang's), with the unit at the end. Counters that would otherwise appear with their first count begin at zero,
so that the first fault is an increase. What is counted per token is a `Distribution`, which costs a third of a client library's
histogram; the live view reads the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from epd.distribution import SECONDS, TOKENS, Distribution, coarser, finer
from epd.exposition import ClusterCollector, MemberLoad, cumulative

STAGES = ("encode", "prefill", "decode")
REFUSALS = ("max_requests", "max_prompt_tokens")
CLIENT_ERRORS = frozenset({"bad_request", "unsupported", "context_length_exceeded", "bad_image", "cancelled"})
"""Outcomes that are no fault of the service: they are counted, and are neither good nor bad for an SLO."""
_FINE_SECONDS = finer(SECONDS, 5)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput."""

    ttft_s: float = 2.0
    tpot_s: float = 0.2  # mean time per output token after the first


class Latencies:
    """The four figures that users feel, in fine buckets."""

    def __init__(self) -> None:
        self.ttft = Distribution(_FINE_SECONDS)
        self.itl = Distribution(_FINE_SECONDS)
        self.tpot = Distribution(_FINE_SECONDS)
        self.e2e = Distribution(_FINE_SECONDS)


class GatewayMetrics:
    """One per gateway, with a registry of its own: two gateways in one process do not meet."""

    def __init__(self, slo: Slo | None = None) -> None:
        self.slo = slo or Slo()
        self.latencies = Latencies()
        self.num_generation_tokens = 0
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("epd_requests", "Requests that have ended, by how", ["outcome"], registry=registry)
        self.refusals = Counter(
            "epd_request_refusals", "Requests refused before any work, by limit", ["reason"], registry=registry
        )
        self.loop_lag = Gauge(
            "epd_gateway_loop_lag_seconds", "How late the gateway's event loop was of late, p99", registry=registry
        )
        self.running = Gauge("epd_requests_running", "Requests that have not ended", registry=registry)
        self.prompt_tokens = Counter("epd_prompt_tokens", "Prompt tokens of admitted requests", registry=registry)
        self.cached_tokens = Counter("epd_cached_prompt_tokens", "Prompt tokens found in prefix caches", registry=registry)
        self.images = Counter("epd_images", "Images of admitted requests", registry=registry)
        self.prompt_sizes = Histogram("epd_request_prompt_tokens", "Prompt tokens per request", buckets=TOKENS, registry=registry)
        self.output_sizes = Histogram(
            "epd_request_generation_tokens", "Output tokens per request that ended well", buckets=TOKENS, registry=registry
        )
        self.judged = Counter(
            "epd_slo_requests", "Requests held against an SLO, by whether they met it", ["slo", "met"], registry=registry
        )
        limits = Gauge("epd_slo_seconds", "The SLOs that requests are held against", ["slo"], registry=registry)
        self.failures = Counter(
            "epd_attempt_failures", "Attempts at a choice that failed, by wire code", ["code"], registry=registry
        )
        self.recoveries = Counter(
            "epd_recoveries", "Choices that began a new attempt, by why the last one ended", ["reason"], registry=registry
        )
        self.recovery_s = Histogram(
            "epd_recovery_seconds", "From an attempt's end to the choice's next token", buckets=SECONDS, registry=registry
        )
        self.needed = Gauge("epd_workers_needed", "1 for stages that requests need a worker of", ["role"], registry=registry)
        self.joined = Counter("epd_workers_joined", "Workers taken in, by stage", ["role"], registry=registry)
        self.lost = Counter("epd_workers_lost", "Workers whose link was lost, by stage", ["role"], registry=registry)
        self.left = Counter("epd_workers_left", "Workers that said goodbye, by stage", ["role"], registry=registry)
        self._cluster = ClusterCollector()
        registry.register(self._cluster)
        registry.register(_TokenCollector(self))
        ProcessCollector(registry=registry)  # process_*: of the gateway itself
        limits.labels("ttft").set(self.slo.ttft_s)
        limits.labels("tpot").set(self.slo.tpot_s)
        self._begin_at_zero()

    def render(self, members: Iterable[MemberLoad], *, loop_lag_s: float = 0.0) -> bytes:
        """Prometheus text of the gateway, whose event loop was so late of late, and of its members' last reports."""
        self.loop_lag.set(max(0.0, loop_lag_s))
        self._cluster.members = tuple(members)
        text: bytes = generate_latest(self._registry)
        return text

    def judge(self, *, ttft_met: bool, tpot_met: bool) -> None:
        """Count a request that is held against both SLOs, and for goodput."""
        self.judged.labels("ttft", _bool(ttft_met)).inc()
        self.judged.labels("tpot", _bool(tpot_met)).inc()
        self.judged.labels("both", _bool(ttft_met and tpot_met)).inc()

    def _begin_at_zero(self) -> None:
        for role in STAGES:
            self.needed.labels(role)
            for counter in (self.joined, self.lost, self.left):
                counter.labels(role)
        for reason in REFUSALS:
            self.refusals.labels(reason)
        for slo in ("ttft", "tpot", "both"):
            for met in (True, False):
                self.judged.labels(slo, _bool(met))
        for code in ("peer_lost", "unavailable", "stale_handle", "corrupt_transfer", "internal"):
            self.failures.labels(code)
            self.recoveries.labels(code)
        self.recoveries.labels("preempted")
        for outcome in ("ok", "cancelled", "internal", "deadline_exceeded", "peer_lost", "unavailable"):
            self.requests.labels(outcome)


class _TokenCollector(Collector):
    """What is counted per token."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics, latencies = metrics, metrics.latencies
        self._figures = (
            ("epd_time_to_first_token_seconds", "First token - arrival", latencies.ttft),
            ("epd_inter_token_latency_seconds", "Gap between two pieces of output of one choice", latencies.itl),
            ("epd_time_per_output_token_seconds", "Mean of a choice's output tokens after the first", latencies.tpot),
            ("epd_e2e_request_latency_seconds", "Last token - arrival, of requests that ended well", latencies.e2e),
        )

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "epd_generation_tokens", "Output tokens sent to clients", value=self._metrics.num_generation_tokens
        )
        for name, text, spread in self._figures:
            family = HistogramMetricFamily(name, text)
            family.add_metric([], cumulative(SECONDS, coarser(spread, SECONDS)), spread.total)
            yield family


def _bool(value: bool) -> str:
    return "true" if value else "false"
