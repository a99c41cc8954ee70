"""Who hears of everything that a gateway does and of what its workers report, and sees to it that it is counted and remembered.

Owns: the gateway's metrics, its history, its alerts. Knows: which happening means what to whom. Decides nothing: a gateway does
the same with or without an observer's opinion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from epd.clock import Clock
from epd.errors import EpdError, Overloaded
from epd.exposition import MemberLoad
from epd.gateway.alerts import Alerts, Signals
from epd.gateway.history import MOMENT_S, History, RequestRecord
from epd.metrics import CLIENT_ERRORS, STAGES, GatewayMetrics
from epd.request import Delta, GenerateRequest
from protocol.messages import StageLoad, WorkerId

_LATELY_S = 60.0
Trace = Callable[[GenerateRequest, RequestRecord], None]
"""Hears of every request that has ended."""


class Observer:
    """One per gateway."""

    def __init__(self, metrics: GatewayMetrics, *, clock: Clock, trace: Trace | None = None) -> None:
        self.metrics = metrics
        self.history = History(metrics.latencies, now=clock(), num_tokens=lambda: metrics.num_generation_tokens)
        self.alerts = Alerts()
        self._clock = clock
        self._trace = trace
        self._missing_roles: Callable[[], Sequence[str]] = tuple
        self._members: dict[WorkerId, MemberLoad] = {}
        self._lost: dict[WorkerId, float] = {}  # when, until it is back
        self._faults = _Faults()
        self._looked_at = -1  # number of the moment

    # --- requests ---------------------------------------------------------------------------------------------------

    def admitted(self, request: GenerateRequest, now: float) -> RequestWatch:
        """Begin to watch a request; tell the watch of every delta and of the end."""
        arrived = now - request.timeline.now()
        record = RequestRecord(
            request.request_id, arrived, len(request.token_ids), len(request.images), request.n, request.timeline
        )
        metrics = self.metrics
        metrics.running.inc()
        metrics.prompt_tokens.inc(record.num_prompt_tokens)
        metrics.prompt_sizes.observe(record.num_prompt_tokens)
        metrics.images.inc(record.num_images)
        self.history.arrived(record, now)
        return RequestWatch(self, request, record)

    def refused(self, error: Overloaded, now: float) -> None:
        self.metrics.refusals.labels(error.limit or "other").inc()
        self.history.refused(now)
        self.history.event("warning", "refused", f"requests are refused: {error.limit or 'overloaded'} reached", now)
        self._look(now)

    def attempt_failed(self, error: EpdError, worker: WorkerId | None) -> None:
        """An attempt at a choice has failed, whether or not another one follows."""
        self.metrics.failures.labels(error.code).inc()
        if error.http_status >= 500:
            self.history.event("warning", "attempt failed", f"attempts fail: {error.code}", self._clock(), worker=worker or "")

    def begun_again(self, reason: str) -> None:
        """A choice begins another attempt: one has failed with the code `reason`, or was "preempted"."""
        self.metrics.recoveries.labels(reason).inc()
        self.history.open.num_recoveries += 1

    def recovered(self, seconds: float) -> None:
        """A choice's first token after an attempt that ended early."""
        self.metrics.recovery_s.observe(seconds)

    # --- workers ----------------------------------------------------------------------------------------------------

    def watch_roles(self, needed: Iterable[str], missing: Callable[[], Sequence[str]]) -> None:
        """Which stages requests need a worker of, and whom to ask which of them nobody can be given work of."""
        needed = frozenset(needed)
        for role in STAGES:
            self.metrics.needed.labels(role).set(role in needed)
        self._missing_roles = missing

    def joined(self, worker: WorkerId, roles: Iterable[str]) -> None:
        roles, now = tuple(roles), self._clock()
        for role in roles:
            self.metrics.joined.labels(role).inc()
        again = " again" if self._lost.pop(worker, None) is not None else ""
        self.history.event("good", "joined", f"worker joined{again} ({', '.join(roles)})", now, worker=worker)

    def reported(self, member: MemberLoad) -> None:
        now, before = self._clock(), self._members.get(member.worker)
        if member.is_draining and not (before is not None and before.is_draining):
            self.history.event("info", "draining", "worker drains: it takes nothing new", now, worker=member.worker)
        if before is not None:
            self._faults.count(before.stages, member.stages)
        self._members[member.worker] = member
        self.history.reported(member, now)
        self._look(now)

    def gone(self, worker: WorkerId, roles: Iterable[str], *, is_lost: bool) -> None:
        now = self._clock()
        for role in roles:
            (self.metrics.lost if is_lost else self.metrics.left).labels(role).inc()
        self._members.pop(worker, None)
        self.history.gone(worker, now)
        if is_lost:
            self._lost[worker] = now
            self.history.event("bad", "lost", "worker lost: it died or hangs", now, worker=worker)
        else:
            self.history.event("info", "left", "worker left", now, worker=worker)
        self._look(now, at_once=True)

    # --- what others see --------------------------------------------------------------------------------------------

    def describe(self, *, after_moment: int, after_revision: int) -> dict[str, object]:
        """What a viewer of the live view does not have yet: History.snapshot() with alerts and SLOs."""
        now = self._clock()
        self._look(now)
        seen = self.history.snapshot(now, after_moment=after_moment, after_revision=after_revision)
        slo = self.metrics.slo
        return {
            **seen,
            "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
            "alerts": [msgspec.to_builtins(alert) for alert in self.alerts.active.values()],
        }

    # --- helpers ----------------------------------------------------------------------------------------------------

    def ended(self, request: GenerateRequest, record: RequestRecord, now: float) -> None:
        """For RequestWatch."""
        self.history.ended(record, now)
        if self._trace is not None:
            self._trace(request, record)

    def _look(self, now: float, *, at_once: bool = False) -> None:
        """Let the alert rules see what is; once a moment."""
        self.history.advance(now)
        if self._looked_at == self.history.open.number and not at_once:
            return
        self._looked_at = self.history.open.number
        begun, ended = self.alerts.evaluate(self._signals(now), now)
        for alert in begun:
            severity = "bad" if alert.severity == "critical" else "warning"
            self.history.event(severity, "alert", f"{alert.name}: {alert.text}", now)
        for alert in ended:
            self.history.event("good", "alert ended", f"{alert.name} is over", now)

    def _signals(self, now: float) -> Signals:
        moments = self.history.last(_LATELY_S)
        self._lost = {worker: at for worker, at in self._lost.items() if now - at <= _LATELY_S}
        faults = self._faults.lately(now)
        stages = [(f"{member.worker}/{stage.role}", stage) for member in self._members.values() for stage in member.stages]
        is_long = len(moments) * MOMENT_S >= _LATELY_S - MOMENT_S
        points = {name: [moment.stages[name] for moment in moments if name in moment.stages] for name, _ in stages}
        seen_long = {name: seen for name, seen in points.items() if is_long and len(seen) == len(moments)}
        return Signals(
            missing_roles=tuple(self._missing_roles()),
            lost_workers=tuple(self._lost),
            num_judged=sum(moment.num_judged for moment in moments),
            num_ttft_missed=sum(moment.num_ttft_missed for moment in moments),
            num_tpot_missed=sum(moment.num_tpot_missed for moment in moments),
            num_failed=sum(moment.num_failed for moment in moments),
            num_arrived=sum(moment.num_arrived for moment in moments),
            num_refused=sum(moment.num_refused for moment in moments),
            queues={name: min(point[0] for point in seen) for name, seen in seen_long.items()},
            full_pools={
                name: min(point[2] for point in seen) for name, seen in seen_long.items() if not name.endswith("/encode")
            },
            num_preemptions=faults.num_preemptions,
            num_failed_transfers=faults.num_failed_transfers,
            num_corrupt_transfers=faults.num_corrupt_transfers,
            num_encoder_evictions=faults.num_encoder_evictions,
            encoder_hit_share=faults.num_encoder_hits / faults.num_encoder_queries if faults.num_encoder_queries else None,
            unclean=tuple(name for name, stage in stages if not stage.is_idle_clean),
        )


class RequestWatch:
    """Counts one request; the first `finished` is the one that counts. `delta` is called for every piece of output."""

    def __init__(self, observer: Observer, request: GenerateRequest, record: RequestRecord) -> None:
        self._observer = observer
        self._request = request
        self._record = record
        self._latencies = observer.metrics.latencies
        self._choices: dict[int, list[float]] = {}  # index -> first and last piece's time, tokens
        self._is_finished = False

    def delta(self, now: float, delta: Delta) -> None:
        record = self._record
        record.num_tokens += delta.num_tokens
        self._observer.metrics.num_generation_tokens += delta.num_tokens
        choice = self._choices.get(delta.index)
        if choice is not None:
            self._latencies.itl.observe(now - choice[1])
            choice[1] = now
            choice[2] += delta.num_tokens
            return
        self._choices[delta.index] = [now, now, delta.num_tokens]
        if record.first_token_s is None:
            record.first_token_s = now - record.arrived
            self._latencies.ttft.observe(record.first_token_s)
        self._observer.metrics.cached_tokens.inc(delta.num_cached_tokens)

    def finished(self, now: float, outcome: str) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        record, metrics = self._record, self._observer.metrics
        record.outcome = outcome
        metrics.running.dec()
        metrics.requests.labels(outcome).inc()
        if outcome == "ok":
            metrics.output_sizes.observe(record.num_tokens)
            self._latencies.e2e.observe(now - record.arrived)
        if outcome not in CLIENT_ERRORS:
            self._judge(outcome == "ok")
        self._observer.ended(self._request, record, now)

    def _judge(self, is_ok: bool) -> None:
        """A request that failed has met nothing. Of several choices the slowest counts."""
        record, metrics = self._record, self._observer.metrics
        tpots = [(last - first) / (num_tokens - 1) for first, last, num_tokens in self._choices.values() if num_tokens > 1]
        for tpot in tpots:
            self._latencies.tpot.observe(tpot)
        record.ttft_met = is_ok and record.first_token_s is not None and record.first_token_s <= metrics.slo.ttft_s
        record.tpot_met = is_ok and max(tpots, default=0.0) <= metrics.slo.tpot_s
        metrics.judge(ttft_met=record.ttft_met, tpot_met=record.tpot_met)


@dataclass(slots=True)
class _FaultCounts:
    num_preemptions: int = 0
    num_failed_transfers: int = 0
    num_corrupt_transfers: int = 0
    num_encoder_evictions: int = 0
    num_encoder_hits: int = 0
    num_encoder_queries: int = 0


@dataclass(slots=True)
class _Faults:
    """What workers' counters have grown by lately, whoever of them started anew meanwhile."""

    _now: _FaultCounts = field(default_factory=_FaultCounts)
    _before: deque[tuple[float, _FaultCounts]] = field(default_factory=deque)

    def count(self, before: Sequence[StageLoad], after: Sequence[StageLoad]) -> None:
        known = {stage.role: stage for stage in before}
        for stage in after:
            was = known.get(stage.role, stage)
            counts, failures, had = self._now, dict(stage.transfer_failures), dict(was.transfer_failures)
            counts.num_preemptions += max(0, stage.num_preemptions - was.num_preemptions)
            counts.num_failed_transfers += max(0, sum(failures.values()) - sum(had.values()))
            counts.num_corrupt_transfers += max(0, failures.get("corrupt_transfer", 0) - had.get("corrupt_transfer", 0))
            if stage.role == "encode":
                counts.num_encoder_evictions += max(0, stage.num_evictions - was.num_evictions)
                counts.num_encoder_hits += max(0, stage.cache_hits - was.cache_hits)
                counts.num_encoder_queries += max(0, stage.cache_queries - was.cache_queries)

    def lately(self, now: float) -> _FaultCounts:
        """Since the last look that is a minute old, or the first one."""
        names = _FaultCounts.__dataclass_fields__
        self._before.append((now, _FaultCounts(**{name: getattr(self._now, name) for name in names})))
        while len(self._before) > 1 and self._before[1][0] <= now - _LATELY_S:
            self._before.popleft()
        was = self._before[0][1]
        return _FaultCounts(**{name: getattr(self._now, name) - getattr(was, name) for name in names})
