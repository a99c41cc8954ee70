"""What differs between a CUDA device and the CPU for a runner: host memory to copy from, marks in the order of work, captures.

A queue works on torch's current stream, whichever that is at the call. The CPU one does everything at once, so that its marks
have always passed and a captured function is the function itself.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the order of work."""

    def has_passed(self) -> bool:
        """Whether the device has done all that was launched before the mark."""

    def wait(self) -> None:
        """Block until then."""

    def seconds_since(self, earlier: Mark) -> float:
        """Time on the device between two marks that have both passed."""


class WorkQueue(Protocol):
    @property
    def device(self) -> torch.device: ...

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of host memory that the device copies from and to by itself. Its content is not set."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy on the device, or between it and `host_memory`, in order with what is launched, without waiting for it."""

    def mark(self) -> Mark: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that launches at little cost what `work` launches, with the same tensors. `work` is run now as well.

        `work` must be harmless to run, read no value of the device, and launch the same kernels every time.
        """

    def synchronize(self) -> None:
        """Block until the device has done everything. For the start and the end, not for steps."""


def open_queue(device: str | torch.device) -> WorkQueue:
    device = torch.device(device)
    if device.type == "cuda":
        return CudaQueue(device)
    return HostQueue()


class HostQueue:
    """Work is done when its call returns."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return _HostMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class _HostMark:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def has_passed(self) -> bool:
        return True

    def wait(self) -> None:
        """It has passed."""

    def seconds_since(self, earlier: Mark) -> float:
        if not isinstance(earlier, _HostMark):
            raise TypeError(f"{earlier!r} is a mark of another queue")
        return self.at - earlier.at


class CudaQueue:
    """torch's streams, events and CUDA graphs. One per runner: its graphs share one memory pool and run one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return _CudaMark(self.device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, so that whatever is made at a first call is there, and capture a second run.

        On a stream that serves nothing else, of the current one's priority, which the graph's kernels take over. Nothing else may
        be recorded on a stream that is captured: memory that steps in flight read is let go at any time, on other threads, and
        torch records an event on each stream that used it. It fails when it asks for one that was captured.

        Only errors of this thread count: other stages' streams may allocate meanwhile. The host waits for nothing.
        """
        with _one_capture, _no_collection(), torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self._side is None:
                self._side = torch.cuda.Stream(priority=current.priority)
            if not self._graphs:  # torch takes a pool that all graphs have left for gone
                self._pool = torch.cuda.graph_pool_handle()
            self._side.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._side):
                work()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            current.wait_stream(self._side)
        self._graphs.add(graph)
        return graph.replay

    def synchronize(self) -> None:
        with _one_capture:
            torch.cuda.synchronize(self.device)


# Whoever waits for the whole device while any of its streams is captured gets an error, and so does the capture.
_one_capture = threading.Lock()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold device memory, and to free that is forbidden to a thread that captures."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def has_passed(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        if not isinstance(earlier, _CudaMark):
            raise TypeError(f"{earlier!r} is a mark of another queue")
        return float(earlier.event.elapsed_time(self.event)) / 1000
