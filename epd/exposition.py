"""Workers' load reports as Prometheus metrics: what only grows is a counter, what is spread is a histogram.

Owns: the names and labels of the cluster's metrics. Does not know: the gateway's own figures, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from epd.distribution import STAGE_FIGURES
from epd.trust import doubts
from protocol.messages import LinkLoad, ProcessLoad, StageLoad, WorkerId


class MemberLoad(NamedTuple):
    """A member of the cluster as it last told of itself."""

    worker: WorkerId
    stages: tuple[StageLoad, ...]
    links: tuple[LinkLoad, ...] = ()
    process: ProcessLoad | None = None
    is_draining: bool = False

    @property
    def is_emulated(self) -> bool:
        return self.process is not None and self.process.device_busy_s >= 0

    @property
    def doubts(self) -> list[str]:
        """Why what its emulated device did is not to be believed."""
        return doubts(self.worker, self.process) if self.process is not None else []


def usage(stage: StageLoad) -> float:
    """Share of a stage's blocks that are neither free nor evictable, 0 to 1."""
    return 1.0 - stage.num_free_blocks / stage.num_blocks if stage.num_blocks else 0.0


_STAGE_GAUGES: dict[str, tuple[str, Callable[[StageLoad], float]]] = {
    "epd_stage_requests_waiting": ("Requests, or images, that wait", lambda stage: stage.num_waiting),
    "epd_stage_requests_running": ("Requests, or images, in work", lambda stage: stage.num_running),
    "epd_stage_outstanding_patches": ("Image patches not encoded yet", lambda stage: stage.outstanding_patches),
    "epd_stage_outstanding_tokens": (
        "Tokens of images not encoded yet, or of prompts not prefilled yet",
        lambda stage: stage.outstanding_tokens,
    ),
    "epd_stage_blocks": ("Blocks of the pool", lambda stage: stage.num_blocks),
    "epd_stage_free_blocks": ("Blocks that are free or evictable", lambda stage: stage.num_free_blocks),
    "epd_stage_cached_blocks": ("Blocks with cached content", lambda stage: stage.num_cached_blocks),
    "epd_stage_block_usage_ratio": ("Share of the pool's blocks that are held, 0 to 1", usage),
    "epd_stage_leases": ("Handles held by other workers", lambda stage: stage.num_leases),
    "epd_stage_integrity_ok": ("1 while every integrity check at idle has passed", lambda stage: stage.is_idle_clean),
}
_STAGE_COUNTERS: dict[str, tuple[str, Callable[[StageLoad], float]]] = {
    "epd_stage_cache_queries": ("Prefix cache: blocks looked up; encoder cache: images", lambda stage: stage.cache_queries),
    "epd_stage_cache_hits": ("Of these, found", lambda stage: stage.cache_hits),
    "epd_stage_evictions": ("Cached blocks that gave way to others", lambda stage: stage.num_evictions),
    "epd_stage_preemptions": ("Requests that gave way to others", lambda stage: stage.num_preemptions),
    "epd_stage_busy_seconds": ("Time spent in steps", lambda stage: stage.busy_s),
    "epd_stage_steps": ("Steps", lambda stage: stage.num_steps),
    "epd_stage_tokens": ("Rows encoded, prompt tokens computed, tokens drawn", lambda stage: stage.num_tokens),
}
_FIGURE_TEXTS = {
    "queue_seconds": "From the ask to the first work on it",
    "preprocess_seconds": "An image file to patches, with its batch",
    "encode_seconds": "Patches to an embedding, with its batch",
    "embedding_wait_seconds": "Time in which a prefill could do nothing for want of an embedding, of requests with images",
    "prefill_seconds": "From the first work on a prompt to its token",
    "kv_receive_seconds": "From the reservation of blocks to the arrival of the last one",
    "decode_seconds": "From the first step of a request to its last token",
    "step_seconds": "One step",
    "step_tokens": "Tokens of one step: rows encoded, prompt tokens computed, tokens drawn",
    "transfer_seconds": "One pull of blocks from another worker, by the rung it went over",
}
_LINK_COUNTERS: dict[str, tuple[str, Callable[[LinkLoad], float]]] = {
    "epd_link_transfers": ("Pulls over the link", lambda link: link.num_transfers),
    "epd_link_transfer_bytes": ("Bytes pulled over the link", lambda link: link.num_bytes),
    "epd_link_transfer_seconds": ("Time of pulls over the link", lambda link: link.transfer_s),
}
_PROCESS_GAUGES: dict[str, tuple[str, Callable[[ProcessLoad], float]]] = {
    "epd_worker_memory_bytes": ("Memory of the process (RSS)", lambda process: process.rss_bytes),
    "epd_device_utilisation_ratio": ("Share of time in which the accelerator ran anything", lambda process: process.utilisation),
    "epd_device_memory_used_bytes": ("Memory of the accelerator in use, by everybody", lambda process: process.memory_used_bytes),
    "epd_device_memory_bytes": ("Memory of the accelerator", lambda process: process.memory_total_bytes),
    "epd_device_power_watts": ("Power that the accelerator draws", lambda process: process.power_w),
    "epd_worker_loop_lag_seconds": ("How late the event loop was of late, p99", lambda process: process.loop_lag_s),
    "epd_worker_host_busy_ratio": ("Share of the host's processor time in use", lambda process: process.host_busy),
    "epd_emulated_busy_seconds": ("Time that work on the emulated device took", lambda process: process.device_busy_s),
    "epd_emulated_late_seconds": ("By how much that work ended too late", lambda process: process.device_late_s),
}


class ClusterCollector(Collector):
    """`members` is what the next scrape shows."""

    def __init__(self) -> None:
        self.members: tuple[MemberLoad, ...] = ()

    def collect(self) -> Iterator[Metric]:
        yield from self._members()
        yield from self._stages()
        yield from self._spreads()
        yield from self._links()
        yield from self._processes()

    def _members(self) -> Iterator[Metric]:
        by_role = GaugeMetricFamily("epd_workers", "Workers that may be given work, by stage", labels=["role"])
        for role in ("encode", "prefill", "decode"):
            here = [1 for member in self.members if not member.is_draining for stage in member.stages if stage.role == role]
            by_role.add_metric([role], len(here))
        yield by_role
        draining = GaugeMetricFamily("epd_worker_draining", "1 while the worker takes nothing new", labels=["worker"])
        for member in self.members:
            draining.add_metric([member.worker], float(member.is_draining))
        yield draining

    def _stages(self) -> Iterator[Metric]:
        stages = [(member.worker, stage) for member in self.members for stage in member.stages]
        for name, (text, read) in _STAGE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["worker", "role"])
            for worker, stage in stages:
                gauge.add_metric([worker, stage.role], float(read(stage)))
            yield gauge
        for name, (text, read) in _STAGE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["worker", "role"])
            for worker, stage in stages:
                counter.add_metric([worker, stage.role], float(read(stage)))
            yield counter
        text = "Pulls that brought no usable blocks, by wire code"
        failures = CounterMetricFamily("epd_stage_transfer_failures", text, labels=["worker", "role", "code"])
        for worker, stage in stages:
            if stage.role != "encode":  # which pulls nothing
                counts = {"stale_handle": 0, "corrupt_transfer": 0, "peer_lost": 0, **dict(stage.transfer_failures)}
                for code, count in counts.items():
                    failures.add_metric([worker, stage.role, code], float(count))
        yield failures

    def _spreads(self) -> Iterator[Metric]:
        for figure, bounds in STAGE_FIGURES.items():
            labels = ["worker", "role", *(["rung"] if figure == "transfer_seconds" else [])]
            family = HistogramMetricFamily(f"epd_stage_{figure}", _FIGURE_TEXTS[figure], labels=labels)
            for member in self.members:
                for stage in member.stages:
                    for spread in stage.spreads:
                        # A worker of another version may have cut its buckets otherwise.
                        if spread.figure == figure and len(spread.counts) == len(bounds) + 1:
                            values = [member.worker, stage.role, spread.label][: len(labels)]
                            family.add_metric(values, cumulative(bounds, spread.counts), spread.total)
            yield family

    def _links(self) -> Iterator[Metric]:
        for name, (text, read) in _LINK_COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=["worker", "peer", "rung"])
            for member in self.members:
                for key, links in _by_peer_and_rung(member.links).items():
                    family.add_metric([member.worker, *key], sum(float(read(link)) for link in links))
            yield family

    def _processes(self) -> Iterator[Metric]:
        processes = [(member.worker, member.process) for member in self.members if member.process is not None]
        cpu = CounterMetricFamily("epd_worker_cpu_seconds", "CPU time of the process", labels=["worker"])
        for worker, process in processes:
            cpu.add_metric([worker], process.cpu_s)
        yield cpu
        for name, (text, read) in _PROCESS_GAUGES.items():
            labels = ["worker"] if name.startswith("epd_worker") else ["worker", "device"]
            family = GaugeMetricFamily(name, text, labels=labels)
            for worker, process in processes:
                value = float(read(process))
                if value >= 0:  # less: nobody can tell
                    family.add_metric([worker, process.device_name][: len(labels)], value)
            yield family


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus writes them: upper bound, and how many values are at most that."""
    names = [*map(str, bounds), "+Inf"]
    return [(name, float(count)) for name, count in zip(names, accumulate(counts), strict=True)]


def _by_peer_and_rung(links: Sequence[LinkLoad]) -> dict[tuple[str, str], list[LinkLoad]]:
    """Two stages of one worker may both pull from a peer: that is one link."""
    found: dict[tuple[str, str], list[LinkLoad]] = {}
    for link in links:
        found.setdefault((link.peer, link.rung), []).append(link)
    return found
