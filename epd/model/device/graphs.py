"""CUDA graphs by batch size: which batch sizes have one, and when it is captured.

A graph is captured over memory that never moves, for one number of rows; a smaller batch is padded to it. One graph serves
contexts of any length: into how many parts the attention kernels split a context depends on the number of rows, and where the
cuts lie is settled on the device by each row's own length (see `gpu.cuda.kernels`). Does not know what is captured.

Where there are several ways to do a step, all are captured and timed in turns, and the fastest is kept: which one that is depends
on the GPU, the model's widths and the versions of libraries.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from epd.model.device.work_queue import WorkQueue

_ROUNDS = 7

Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """Which steps run from graphs.

    A capture takes about the time of two steps and their launches. What is not captured at start is captured when a step first
    needs it, which all requests of that step wait for: so only batches that few servers reach are left for then.
    """

    max_batch: int = 512  # larger steps are launched kernel by kernel; 0: all are
    captured_at_start: int = 256  # batch sizes up to this
    linear: Literal["separate", "fused", "fastest"] = "fastest"  # of few rows: see `gpu.cuda.kernels.FusedLinear`


class Graphs:
    """What has been captured of the work of each bucket."""

    def __init__(
        self, queue: WorkQueue, ways_of: Callable[[int], Mapping[str, Work]], options: GraphOptions, largest: int
    ) -> None:
        """`ways_of(batch)`: by name, what does the same for so many rows, for `WorkQueue.capture`. No batch exceeds `largest`."""
        self.buckets = batch_buckets(min(options.max_batch, largest))
        self.at_start = tuple(batch for batch in self.buckets if batch <= options.captured_at_start)
        self.timed: dict[int, dict[str, float]] = {}  # batch size -> seconds of each way, where there were several
        self._queue = queue
        self._ways_of = ways_of
        self._replays: dict[int, Work] = {}

    @property
    def captured(self) -> frozenset[int]:
        """Batch sizes."""
        return frozenset(self._replays)

    def bucket_of(self, num_rows: int) -> int | None:
        """The smallest that holds so many rows; None where there is none."""
        return next((batch for batch in self.buckets if batch >= num_rows > 0), None)

    def capture(self, batch: int) -> None:
        """Runs the work as well, and waits for the device where there is a choice."""
        replays = {name: self._queue.capture(work) for name, work in self._ways_of(batch).items()}
        if len(replays) > 1:
            self.timed[batch] = self._time(replays)
        seconds = self.timed.get(batch, {})
        self._replays[batch] = replays[min(replays, key=lambda name: seconds.get(name, 0.0))]

    def replay(self, batch: int) -> None:
        self._replays[batch]()

    def _time(self, replays: Mapping[str, Work]) -> dict[str, float]:
        """Median seconds of each, in turns, so that a clock that rises or falls meanwhile favours none."""
        marks = [self._queue.mark()]
        for _ in range(_ROUNDS):
            for replay in replays.values():
                replay()
                marks.append(self._queue.mark())
        marks[-1].wait()
        took = [after.seconds_since(before) for before, after in pairwise(marks)]
        return {name: statistics.median(took[place :: len(replays)]) for place, name in enumerate(replays)}


def batch_buckets(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... below `largest`, and that itself."""
    buckets = []
    size = 1
    while size < largest:
        buckets.append(size)
        if size >= 16 and size * 3 // 2 < largest:
            buckets.append(size * 3 // 2)
        size *= 2
    return (*buckets, largest) if largest > 0 else ()
