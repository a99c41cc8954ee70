"""The last minutes of a cluster as its gateway saw them: what the live view shows.

Time is cut into moments of two seconds. A moment is closed when time has passed it, and keeps the figures of its requests, of
every stage and of every link. Beside them: the requests that run, those that ended last, and events. Everything is bounded. What
changed after a revision can be asked for, so that a viewer who looks every second gets each thing once.

Owns: these rings. Does not know: the clock (`now` is handed in), Prometheus, HTTP, who looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from epd.distribution import Distribution, quantile
from epd.exposition import MemberLoad, usage
from epd.metrics import Latencies
from epd.timeline import Timeline, TimelineSpan
from protocol.messages import StageLoad

MOMENT_S = 2.0
MAX_MOMENTS = 300  # ten minutes
MAX_REQUESTS = 50  # that have ended
MAX_SHOWN_RUNNING = 25
MAX_SPANS = 80  # of one request
MAX_EVENTS = 200
SAME_EVENT_S = 10.0  # within which equal events are one

StagePoint = tuple[int, int, float, float, float | None]
"""Of a stage at a moment: waiting, running, share of blocks held, share of time in steps, share of cache look-ups that hit."""


class Moment(msgspec.Struct):
    """Two seconds. Latencies in seconds, None where nothing was measured; ITL is of every output token's gap."""

    number: int
    start: float  # on the gateway's clock
    num_arrived: int = 0
    num_refused: int = 0
    num_ok: int = 0
    num_failed: int = 0
    num_judged: int = 0  # ended and held against the SLOs
    num_good: int = 0  # of these, met them
    num_ttft_missed: int = 0
    num_tpot_missed: int = 0
    num_tokens: int = 0
    num_running: int = 0  # the most at once
    num_recoveries: int = 0
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    itl_p50: float | None = None
    itl_p99: float | None = None
    stages: dict[str, StagePoint] = {}  # "worker/role"
    links: dict[str, float] = {}  # "worker<peer" -> bytes per second pulled


class Event(msgspec.Struct):
    """Something that an operator may want to know of."""

    revision: int
    at: float
    severity: str  # "good", "info", "warning" or "bad"
    kind: str
    text: str
    worker: str = ""
    count: int = 1


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request, from its admission on."""

    request_id: str
    arrived: float
    num_prompt_tokens: int
    num_images: int
    num_choices: int
    timeline: Timeline
    revision: int = 0
    num_tokens: int = 0
    first_token_s: float | None = None  # since arrival
    ended_s: float | None = None
    outcome: str = ""
    ttft_met: bool | None = None  # None: not held against the SLO
    tpot_met: bool | None = None

    @property
    def is_good(self) -> bool | None:
        return None if self.ttft_met is None else bool(self.ttft_met and self.tpot_met)

    def describe(self, now: float) -> dict[str, object]:
        spans = self.timeline.spans()
        return {
            "id": self.request_id,
            "revision": self.revision,
            "at": self.arrived,
            "age_s": now - self.arrived,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_images": self.num_images,
            "num_choices": self.num_choices,
            "num_tokens": self.num_tokens,
            "num_attempts": sum(span.name == "placement" for span in spans),
            "ttft_s": self.first_token_s,
            "e2e_s": self.ended_s,
            "outcome": self.outcome,
            "is_good": self.is_good,
            "spans": [_span(span) for span in spans[:MAX_SPANS]],
            "num_more_spans": max(0, len(spans) - MAX_SPANS),
        }


@dataclass(slots=True)
class _Before:
    """Counters as they stood when the open moment began."""

    ttft: list[int]
    itl: list[int]
    num_tokens: int = 0
    stages: dict[str, StageLoad] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)

    def knows(self, link: str) -> bool:
        """Whether the puller of a link was there: what a newcomer has counted before it came is not of this moment."""
        worker = link.partition("<")[0]
        return any(stage.rpartition("/")[0] == worker for stage in self.stages)


class History:
    """One per gateway. A moment keeps what has been added to the gateway's latencies, and to its tokens, in it."""

    def __init__(self, latencies: Latencies, *, now: float, num_tokens: Callable[[], int] = int) -> None:
        self.began = now
        self.revision = 0
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._latencies = latencies
        self._num_tokens = num_tokens
        self._moments: deque[Moment] = deque(maxlen=MAX_MOMENTS)
        self._running: dict[int, RequestRecord] = {}  # by id(): a client may send an id twice
        self._ended: deque[RequestRecord] = deque(maxlen=MAX_REQUESTS)
        self._members: dict[str, MemberLoad] = {}
        self._before = _Before(list(latencies.ttft.counts), list(latencies.itl.counts))
        self.open = Moment(0, now)

    # --- what happens -----------------------------------------------------------------------------------------------

    def arrived(self, record: RequestRecord, now: float) -> None:
        self.advance(now)
        self._running[id(record)] = record
        self.open.num_arrived += 1
        self.open.num_running = max(self.open.num_running, len(self._running))

    def refused(self, now: float) -> None:
        self.advance(now)
        self.open.num_arrived += 1
        self.open.num_refused += 1

    def ended(self, record: RequestRecord, now: float) -> None:
        """`record` says how; a client's own mistake, or leaving, is neither good nor bad."""
        self.advance(now)
        if self._running.pop(id(record), None) is None:
            return
        record.ended_s = now - record.arrived
        record.revision = self._next_revision()
        self._ended.append(record)
        if record.outcome == "ok":
            self.open.num_ok += 1
        elif record.is_good is not None:
            self.open.num_failed += 1
        if record.is_good is not None:
            self.open.num_judged += 1
            self.open.num_good += record.is_good
            self.open.num_ttft_missed += not record.ttft_met
            self.open.num_tpot_missed += not record.tpot_met

    def reported(self, member: MemberLoad, now: float) -> None:
        """A worker's load; the last one in a moment is the one that is kept."""
        self.advance(now)
        self._members[member.worker] = member

    def gone(self, worker: str, now: float) -> None:
        self.advance(now)
        self._members.pop(worker, None)

    def event(self, severity: str, kind: str, text: str, now: float, *, worker: str = "") -> None:
        """Note an event; the same one again within a short time only counts."""
        self.advance(now)
        for known in reversed(self.events):
            if now - known.at > SAME_EVENT_S:
                break
            if (known.kind, known.text, known.worker) == (kind, text, worker):
                known.count += 1
                known.revision = self._next_revision()
                return
        self.events.append(Event(self._next_revision(), now, severity, kind, text, worker))

    def advance(self, now: float) -> int:
        """Close the moments that have passed; returns how many that were. Silence longer than the ring is not spelled out."""
        num_passed = int((now - self.open.start) / MOMENT_S)
        if num_passed < 1:
            return 0
        self._close()
        first = self.open.number + 1
        skipped = max(0, num_passed - 1 - MAX_MOMENTS)
        for number in range(first + skipped, first + num_passed - 1):
            self._moments.append(Moment(number, self._start_of(number), num_running=len(self._running)))
        number = first + num_passed - 1
        self.open = Moment(number, self._start_of(number), num_running=len(self._running))
        return num_passed

    # --- what is seen -----------------------------------------------------------------------------------------------

    def last(self, seconds: float) -> list[Moment]:
        """The closed moments of the last so many seconds, oldest first."""
        first = self.open.start - seconds
        return [moment for moment in self._moments if moment.start >= first]

    def snapshot(self, now: float, *, after_moment: int = -1, after_revision: int = 0) -> dict[str, object]:
        """What a viewer does not have yet, as plain JSON values. Times (`at`, `start`) are on the clock that `now` shows."""
        self.advance(now)
        running = list(self._running.values())
        return {
            "now": now,
            "uptime_s": now - self.began,
            "moment_s": MOMENT_S,
            "max_moments": MAX_MOMENTS,
            "revision": self.revision,
            "moments": [msgspec.to_builtins(moment) for moment in self._moments if moment.number > after_moment],
            "running": [record.describe(now) for record in running[-MAX_SHOWN_RUNNING:]],
            "num_running": len(running),
            "requests": [record.describe(now) for record in self._ended if record.revision > after_revision],
            "events": [msgspec.to_builtins(event) for event in self.events if event.revision > after_revision],
        }

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        moment, before, latencies = self.open, self._before, self._latencies
        ttft, itl = _since(latencies.ttft, before.ttft), _since(latencies.itl, before.itl)
        num_tokens = self._num_tokens()
        moment.num_tokens = num_tokens - before.num_tokens
        moment.ttft_p50, moment.ttft_p99 = _ends(latencies.ttft, ttft)
        moment.itl_p50, moment.itl_p99 = _ends(latencies.itl, itl)
        stages = {f"{member.worker}/{stage.role}": stage for member in self._members.values() for stage in member.stages}
        moment.stages = {name: _point(stage, before.stages.get(name)) for name, stage in stages.items()}
        links = _bytes_of_links(self._members.values())
        moved = {name: num_bytes - before.links.get(name, 0) for name, num_bytes in links.items() if before.knows(name)}
        moment.links = {name: num_bytes / MOMENT_S for name, num_bytes in moved.items() if num_bytes > 0}
        self._moments.append(moment)
        self._before = _Before(list(latencies.ttft.counts), list(latencies.itl.counts), num_tokens, stages, links)

    def _start_of(self, number: int) -> float:
        return self.began + number * MOMENT_S

    def _next_revision(self) -> int:
        self.revision += 1
        return self.revision


def _since(spread: Distribution, before: Sequence[int]) -> list[int]:
    return [count - was for count, was in zip(spread.counts, before, strict=True)]


def _ends(spread: Distribution, counts: Sequence[int]) -> tuple[float | None, float | None]:
    return quantile(spread.bounds, counts, 0.5), quantile(spread.bounds, counts, 0.99)


def _point(stage: StageLoad, before: StageLoad | None) -> StagePoint:
    """What a worker that has started again shows is what it did since; what a newcomer shows may be of long ago."""
    if before is None:
        before = stage
    elif stage.num_steps < before.num_steps or stage.busy_s < before.busy_s:
        before = StageLoad(stage.role)
    busy = min(1.0, (stage.busy_s - before.busy_s) / MOMENT_S)
    num_queries = stage.cache_queries - before.cache_queries
    hit = (stage.cache_hits - before.cache_hits) / num_queries if num_queries > 0 else None
    return stage.num_waiting, stage.num_running, round(usage(stage), 4), round(max(0.0, busy), 4), hit and round(hit, 4)


def _bytes_of_links(members: Iterable[MemberLoad]) -> dict[str, int]:
    found: dict[str, int] = {}
    for member in members:
        for link in member.links:
            name = f"{member.worker}<{link.peer}"
            found[name] = found.get(name, 0) + link.num_bytes
    return found


def _span(span: TimelineSpan) -> tuple[str, str, str, float, float]:
    return span.name, span.stage, span.worker, round(span.start_s, 6), round(span.end_s, 6)
