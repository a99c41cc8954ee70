"""The timeline of one emulated device: who occupies it, and until when.

Stages of one process share a device as they would share a GPU. What waits for it is chosen by a `Sharing`, and lasts as long as
the profile says. Ends are laid end to end on the device's own timeline: a thread that wakes late makes that work's end late, not
the next one's start, and how late is counted, because a host that is too slow would otherwise pass for a slow device.

Owns: the device's thread. Knows: costs. Does not know: requests, pools, what is computed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from epd.emulated.cost import TextWork, encode_s, text_s
from epd.emulated.profile import Profile
from epd.errors import InternalError


class Sharing(StrEnum):
    """What a device does when several stages wait for it. A stage that has it for itself is not affected."""

    PREFILL_FIRST = "prefill-first"  # encoding, then prompts, then tokens: each alone, as an engine without chunks would
    FUSED = "fused"  # prompt chunks and tokens in one batch (Sarathi-Serve, arXiv 2403.02310), images in turn with them


_ORDER = ("encode", "prefill", "decode")


@dataclass(slots=True, eq=False)
class Work:
    """What one stage asks of the device."""

    stage: str
    text: TextWork = field(default_factory=TextWork)
    patches: tuple[int, ...] = ()
    arrived_at: float = 0.0
    done: Future[None] = field(default_factory=Future, repr=False)


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep_until(self, when: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, when: float) -> None:
        left = when - time.monotonic()
        if left > 0:
            time.sleep(left)


class EmulatedDevice:
    """One per process. `launch` is called by the stages' streams, `close` by whoever made it.

    With a `beat_s`, work that finds the device idle begins at `phase_s` after a multiple of it on the host's monotonic clock, so
    that whoever knows how long steps take knows when they end.
    """

    def __init__(
        self,
        profile: Profile,
        sharing: Sharing = Sharing.FUSED,
        clock: Clock | None = None,
        *,
        beat_s: float = 0.0,
        phase_s: float = 0.0,
    ) -> None:
        self.profile = profile
        self.late_s = 0.0  # by how much work ended later than it should have, summed
        self.busy_s = 0.0
        self._sharing = sharing
        self._clock = clock or RealClock()
        self._beat_s = beat_s
        self._phase_s = phase_s
        self._free_at = 0.0
        self._last_stage = ""
        self._waiting: list[Work] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="emulated device", daemon=True)
        self._thread.start()

    def launch(self, work: Work) -> Work:
        """Have the device do this work, after or along with what else waits; `work.done` tells when it has."""
        with self._changed:
            if self._closed:
                raise InternalError("the emulated device has been closed")
            work.arrived_at = self._clock.now()
            self._waiting.append(work)
            self._changed.notify()
        return work

    def close(self) -> None:
        """Fail what waits, and end the thread after the work that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for work in self._waiting:
                        work.done.set_exception(InternalError("the emulated device has been closed"))
                    return
                chosen = choose(self._waiting, self._sharing, self._last_stage)
                self._waiting = [work for work in self._waiting if work not in chosen]
            self._occupy(chosen)
            for work in chosen:
                work.done.set_result(None)

    def _occupy(self, chosen: Sequence[Work]) -> None:
        seconds = cost_s(self.profile, chosen)
        end = self._start(max(work.arrived_at for work in chosen)) + seconds
        self._clock.sleep_until(end)
        self._free_at = end
        self._last_stage = chosen[0].stage
        self.busy_s += seconds
        self.late_s += max(0.0, self._clock.now() - end)

    def _start(self, arrived_at: float) -> float:
        if arrived_at <= self._free_at or not self._beat_s:
            return max(self._free_at, arrived_at)
        return math.ceil((arrived_at - self._phase_s) / self._beat_s) * self._beat_s + self._phase_s


def choose(waiting: Sequence[Work], sharing: Sharing, last_stage: str) -> list[Work]:
    """What of `waiting`, in order of arrival and never empty, occupies the device next."""
    if sharing is Sharing.PREFILL_FIRST:
        return [min(waiting, key=lambda work: _ORDER.index(work.stage))]
    text = _first_of_each(waiting, ("prefill", "decode"))
    images = _first_of_each(waiting, ("encode",))
    if images and (last_stage != "encode" or not text):
        return images
    return text


def cost_s(profile: Profile, chosen: Sequence[Work]) -> float:
    """Seconds of works that run as one batch."""
    text = sum((work.text for work in chosen), TextWork())
    return text_s(profile, text) + encode_s(profile, [count for work in chosen for count in work.patches])


def _first_of_each(waiting: Sequence[Work], stages: Sequence[str]) -> list[Work]:
    found: dict[str, Work] = {}
    for work in waiting:
        if work.stage in stages:
            found.setdefault(work.stage, work)
    return list(found.values())
