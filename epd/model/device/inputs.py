"""From the host's arrays to the device's: many small arrays side by side in one run of bytes, so that one copy brings them all.

Owns the host memory that such copies read. It is not written again before the copy out of it has been done: `Staging` asks the
mark behind the copy, and takes other memory where that has not passed. Does not know what the arrays mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epd.model.device.work_queue import Mark, WorkQueue

Array = npt.NDArray[np.generic]
Shape = tuple[int, ...]

_ALIGNMENT = 256  # bytes, at which a device likes its arrays to begin
_DTYPES = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


@dataclass(frozen=True)
class _Place:
    start: int
    end: int
    dtype: torch.dtype
    shape: Shape


class Layout:
    """Where each of some arrays lies in a run of bytes."""

    def __init__(self, arrays: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        self._places: dict[str, _Place] = {}
        self.num_bytes = 0
        for name, (dtype, shape) in arrays.items():
            end = self.num_bytes + math.prod(shape) * dtype.itemsize
            self._places[name] = _Place(self.num_bytes, end, dtype, shape)
            self.num_bytes = -(-end // _ALIGNMENT) * _ALIGNMENT

    def arrays(self, memory: Tensor) -> dict[str, Array]:
        """NumPy views of host memory, uint8 [>= num_bytes], of those that NumPy has a dtype for."""
        bytes_ = memory.numpy()
        return {
            name: bytes_[place.start : place.end].view(_DTYPES[place.dtype]).reshape(place.shape)
            for name, place in self._places.items()
            if place.dtype in _DTYPES
        }

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of device memory, uint8 [>= num_bytes]."""
        return {name: memory[place.start : place.end].view(place.dtype).view(place.shape) for name, place in self._places.items()}


class Staging:
    """Host memory of one runner for what it sends to the device."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self._sent: list[_Sent] = []  # in order of sending
        self._memory = torch.empty(0, dtype=torch.uint8, device=queue.device)

    def begin(self, layout: Layout) -> Staged:
        """Host arrays to fill, whose memory no copy is reading. Does not wait: where all is being read, there is more memory."""
        for place, sent in enumerate(self._sent):
            if len(sent.memory) >= layout.num_bytes and sent.mark.has_passed():
                del self._sent[place]
                return Staged(layout, sent.memory)
        self._sent = [sent for sent in self._sent if not sent.mark.has_passed()]  # too small to be of use again
        return Staged(layout, self._queue.host_memory(max(layout.num_bytes, _ALIGNMENT)))

    def upload(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A host tensor as one of `dtype` on the device, in memory of its own."""
        staged = self.begin(Layout({"rows": (dtype, tuple(rows.shape))}))
        staged.layout.tensors(staged.memory)["rows"].copy_(rows)
        memory = torch.empty(staged.layout.num_bytes, dtype=torch.uint8, device=self._queue.device)
        return self.send(staged, memory)["rows"]

    def send(self, staged: Staged, target: Tensor | None = None) -> dict[str, Tensor]:
        """Copy to device memory: to `target`, uint8 [>= num_bytes], or to memory that the next `send` without one takes again.

        Returns the arrays on the device. The host's may not be touched any more.
        """
        num_bytes = staged.layout.num_bytes
        if target is None:
            if len(self._memory) < num_bytes:
                self._memory = torch.empty(2 * num_bytes, dtype=torch.uint8, device=self._queue.device)
            target = self._memory
        self._queue.copy(staged.memory[:num_bytes], target[:num_bytes])
        self._sent.append(_Sent(staged.memory, self._queue.mark()))
        return staged.layout.tensors(target)


class Staged:
    """Arrays to fill before they are sent."""

    def __init__(self, layout: Layout, memory: Tensor) -> None:
        self.layout = layout
        self.memory = memory
        self._arrays = layout.arrays(memory)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]


@dataclass(frozen=True)
class _Sent:
    memory: Tensor
    mark: Mark  # behind the copy
