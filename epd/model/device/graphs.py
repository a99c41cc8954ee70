"""Decode steps that are launched at once: for which batch sizes and context lengths there is a graph, and when it is captured.

A graph (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs) is captured per bucket of batch size and class of
context length, over memory that never moves. The class matters because the kernels choose in how many parts to split a context by
the width of the block tables, before the device knows how long each one is: with one width for all, a batch of short contexts
would launch thread blocks for the longest. Does not know what is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from epd.model.device.work_queue import WorkQueue

_LEAST_CLASS = 2048  # tokens of context; a class below would save a few thread blocks that have nothing to do
_CLASS_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """Which steps run from graphs.

    A capture takes about the time of two steps and their launches, so that the small batches' are made at start (whoever starts a
    server soon sends one request), and the others when a step first needs them, which costs that step its capture.
    """

    max_batch: int = 512  # larger steps are launched kernel by kernel; 0: all are
    captured_at_start: tuple[int, ...] = (1, 2, 4, 8)  # batch sizes; the longest context class is captured when it is needed


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What one graph is captured for."""

    batch: int  # rows
    num_blocks: int  # width of the block tables


class Shapes:
    """The buckets of a runner: batch sizes 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... and fourfold context classes."""

    def __init__(self, options: GraphOptions, *, max_sequences: int, max_model_len: int, block_size: int) -> None:
        self._options = options
        self.batches = batch_buckets(min(options.max_batch, max_sequences))
        self.widths = context_widths(max_model_len, block_size)

    @property
    def largest(self) -> Shape:
        return Shape(self.batches[-1] if self.batches else 0, self.widths[-1])

    def of(self, num_sequences: int, num_blocks: int) -> Shape | None:
        """The smallest that holds so many sequences with so many blocks each; None where there is none."""
        batch = next((batch for batch in self.batches if batch >= num_sequences), None)
        width = next((width for width in self.widths if width >= num_blocks), None)
        return None if batch is None or width is None or num_sequences == 0 else Shape(batch, width)

    def at_start(self) -> list[Shape]:
        return [Shape(batch, self.widths[0]) for batch in self.batches if batch in self._options.captured_at_start]


@dataclass(slots=True)
class Graphs:
    """What has been captured. `work_of` makes the function to capture for a shape: see `WorkQueue.capture`."""

    queue: WorkQueue
    work_of: Callable[[Shape], Callable[[], None]]
    _replays: dict[Shape, Callable[[], None]] = field(default_factory=dict)

    def launch(self, shape: Shape) -> None:
        """Replay the graph of a shape, captured before if that has not been done."""
        self.capture(shape)
        self._replays[shape]()

    def capture(self, shape: Shape) -> None:
        if shape not in self._replays:
            self._replays[shape] = self.queue.capture(self.work_of(shape))

    @property
    def captured(self) -> frozenset[Shape]:
        return frozenset(self._replays)


def batch_buckets(largest: int) -> tuple[int, ...]:
    """Powers of two up to 16, then those and one and a half times each, and `largest` itself."""
    buckets = []
    size = 1
    while size < largest:
        buckets.append(size)
        if size >= 16 and size * 3 // 2 < largest:
            buckets.append(size * 3 // 2)
        size *= 2
    return (*buckets, largest) if largest else ()


def context_widths(max_model_len: int, block_size: int) -> tuple[int, ...]:
    """Numbers of blocks, rising fourfold to what the longest context takes."""
    widths = [-(-max_model_len // block_size)]
    while widths[0] > 1 and widths[0] * block_size > _LEAST_CLASS:
        widths.insert(0, -(-widths[0] // _CLASS_RATIO))
    return tuple(widths)
