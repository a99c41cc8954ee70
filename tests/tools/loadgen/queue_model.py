"""A server whose capacity is known: one request after another, each for a fixed time, computed instead of waited for."""

from __future__ import annotations

import asyncio

from tests.tools.loadgen.scripted import VirtualClock
from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest


class QueueModel:
    """An Asker on virtual time; `sleep` is what moves it. It answers `1 / service_s` requests per second, and no more."""

    def __init__(self, service_s: float) -> None:
        self.clock = VirtualClock()
        self.service_s = service_s
        self.requests: list[LoadRequest] = []
        self._free_at_s = 0.0

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(0)  # what is due before is asked before
        self.clock.now_s += delay_s

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
        self.requests.append(request)
        sent_s = self.clock.now_s
        self._free_at_s = max(self._free_at_s, sent_s) + self.service_s
        if scheduled_s is None:
            self.clock.now_s = max(self.clock.now_s, self._free_at_s)
        return Record(
            request.index,
            sent_s if scheduled_s is None else scheduled_s,
            sent_s,
            turn=request.turn,
            kind=request.kind,
            num_images=request.num_images,
            piece_times_s=[self._free_at_s - self.service_s / 2, self._free_at_s],
            end_s=self._free_at_s,
            outcome="ok",
            input_tokens=8,
            output_tokens=2,
            has_usage=True,
            spans=[{"name": "prefill", "stage": "prefill", "worker": "p0", "start_s": 0.0, "end_s": self.service_s}],
        )

    def cut_off(self) -> None:
        pass

    def reopen(self) -> None:
        self._free_at_s = 0.0
