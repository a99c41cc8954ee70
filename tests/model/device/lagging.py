"""A queue of work that copies late, as a device does: what is in host memory when the copy happens is what arrives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from epd.model.device.work_queue import HostQueue, Mark


class LaggingQueue(HostQueue):
    """Copies wait until `catch_up`."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[Callable[[], object]] = []
        self.num_done = 0
        self.num_made = 0
        self.host_memories: list[Tensor] = []

    def host_memory(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), 0xEE, dtype=torch.uint8)
        self.host_memories.append(memory)
        return memory

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.num_made += 1
        self.late.append(lambda: target.copy_(source))

    def mark(self) -> Mark:
        return _LateMark(self, self.num_made)

    def catch_up(self, count: int = 1_000) -> None:
        for _ in range(min(count, len(self.late))):
            self.late.pop(0)()
            self.num_done += 1


class _LateMark:
    def __init__(self, queue: LaggingQueue, count: int) -> None:
        self._queue, self._count = queue, count

    def has_passed(self) -> bool:
        return self._queue.num_done >= self._count

    def wait(self) -> None:
        self._queue.catch_up()

    def seconds_since(self, earlier: Mark) -> float:
        return 0.0
