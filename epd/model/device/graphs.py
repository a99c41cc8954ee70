"""CUDA graphs by batch size: which batch sizes have one, and when it is captured.

A graph is captured over memory that never moves, for one number of rows; a smaller batch is padded to it. One graph serves
contexts of any length: into how many parts the attention kernels split a context depends on the number of rows, and where the
cuts lie is settled on the device by each row's own length (see `gpu.cuda.kernels`). Does not know what is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epd.model.device.work_queue import WorkQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """Which steps run from graphs.

    A capture takes about the time of two steps and their launches. What is not captured at start is captured when a step first
    needs it, which all requests of that step wait for: so only batches that few servers reach are left for then.
    """

    max_batch: int = 512  # larger steps are launched kernel by kernel; 0: all are
    captured_at_start: int = 256  # batch sizes up to this


class Graphs:
    """What has been captured of the work of each bucket."""

    def __init__(
        self, queue: WorkQueue, work_of: Callable[[int], Callable[[], None]], options: GraphOptions, largest: int
    ) -> None:
        """`work_of(batch)` makes what `WorkQueue.capture` is to capture for so many rows. No batch exceeds `largest`."""
        self.buckets = batch_buckets(min(options.max_batch, largest))
        self.at_start = tuple(batch for batch in self.buckets if batch <= options.captured_at_start)
        self._queue = queue
        self._work_of = work_of
        self._replays: dict[int, Callable[[], None]] = {}

    @property
    def captured(self) -> frozenset[int]:
        """Batch sizes."""
        return frozenset(self._replays)

    def bucket_of(self, num_rows: int) -> int | None:
        """The smallest that holds so many rows; None where there is none."""
        return next((batch for batch in self.buckets if batch >= num_rows > 0), None)

    def capture(self, batch: int) -> None:
        """Runs the work as well."""
        self._replays[batch] = self._queue.capture(self._work_of(batch))

    def replay(self, batch: int) -> None:
        self._replays[batch]()


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
