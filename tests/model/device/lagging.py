"""A queue whose copies and captured functions are done late, in order, as a device does them: with what is there by then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from epd.model.device.work_queue import HostQueue, Mark


class LaggingQueue(HostQueue):
    """While `is_late`, work waits until `catch_up`, or until somebody waits for a mark behind it."""

    def __init__(self, *, is_late: bool = True) -> None:
        super().__init__()
        self.is_late = is_late
        self.waiting: list[Callable[[], object]] = []
        self.host_memories: list[Tensor] = []
        self._num_given = 0

    def host_memory(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), 0x6E, dtype=torch.uint8)
        self.host_memories.append(memory)
        return memory

    def copy(self, source: Tensor, target: Tensor) -> None:
        self._give(lambda: target.copy_(source))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self._give(work)
        return lambda: self._give(work)

    def mark(self) -> Mark:
        return _LateMark(self, self._num_given)

    @torch.inference_mode()
    def catch_up(self, count: int = 1_000) -> None:
        for _ in range(min(count, len(self.waiting))):
            self.waiting.pop(0)()

    @property
    def num_done(self) -> int:
        return self._num_given - len(self.waiting)

    def _give(self, work: Callable[[], object]) -> None:
        self._num_given += 1
        self.waiting.append(work)
        if not self.is_late:
            self.catch_up()


class _LateMark:
    def __init__(self, queue: LaggingQueue, count: int) -> None:
        self._queue, self._count = queue, count

    def has_passed(self) -> bool:
        return self._queue.num_done >= self._count

    def wait(self) -> None:
        self._queue.catch_up(self._count - self._queue.num_done)

    def seconds_since(self, earlier: Mark) -> float:
        return 0.0
