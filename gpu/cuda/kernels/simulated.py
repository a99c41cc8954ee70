"""`device`'s functions for the CUDA simulator, in Python. As there, one thread block of one launch runs at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.cuda.simulator.kernelapi import FakeCUDAShared
from torch import Tensor

WARP = 8  # enough to show what goes wrong between threads; the time that a launch takes grows with it
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR = 0xD6E8FEB86659FD93

Words = tuple[np.uint32, np.uint32, np.uint32, np.uint32]


class Memory:
    """A tensor's bytes. A read or write beside them raises IndexError, which fails the launch."""

    def __init__(self, tensor: Tensor) -> None:
        import torch

        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.as_strided((_extent(tensor),), (1,))
        self._bytes: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
        self._lock = threading.Lock()

    def read(self, dtype: Any, index: int, count: int = 1) -> npt.NDArray[Any]:
        return self._at(dtype, index, count).view(dtype)

    def write(self, dtype: Any, index: int, values: Any) -> None:
        found = np.array(values, dtype)
        self._at(dtype, index, found.size)[:] = found.view(np.uint8)

    def add(self, index: int, value: int) -> None:
        with self._lock:
            self.write(np.uint64, index, [(int(self.read(np.uint64, index)[0]) + value) & _MASK])

    def _at(self, dtype: Any, index: int, count: int) -> npt.NDArray[np.uint8]:
        size = np.dtype(dtype).itemsize
        first, last = int(index) * size, (int(index) + count) * size
        if first < 0 or last > len(self._bytes):
            raise IndexError(f"bytes {first}..{last} of a tensor of {len(self._bytes)}")
        return self._bytes[first:last]


def address(tensor: Tensor) -> Any:
    return Memory(tensor)


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not the simulator's own: that exchanges a module's `cuda` during a call, which threads would undo under each other."""
    return function


def load_words(memory: Memory, unit: int) -> Words:
    a, b, c, d = memory.read(np.uint32, 4 * unit, 4)
    return a, b, c, d


def store_words(memory: Memory, unit: int, words: Words) -> None:
    memory.write(np.uint32, 4 * unit, list(words))


def load_pair(memory: Memory, unit: int) -> tuple[int, int]:
    a, b = memory.read(np.uint64, 2 * unit, 2)
    return int(a), int(b)


def store_pair(memory: Memory, unit: int, pair: tuple[int, int]) -> None:
    memory.write(np.uint64, 2 * unit, list(pair))


def load_i32(memory: Memory, index: int) -> int:
    return int(memory.read(np.int32, index)[0])


def load_i64(memory: Memory, index: int) -> int:
    return int(memory.read(np.int64, index)[0])


def load_f32(memory: Memory, index: int) -> np.float32:
    return np.float32(memory.read(np.float32, index)[0])


def store_f32(memory: Memory, index: int, value: np.float32) -> None:
    memory.write(np.float32, index, [value])


def add_to_sum(memory: Memory, index: int, value: int) -> None:
    memory.add(index, value)


def as_float(bits: np.uint32) -> np.float32:
    return bits.view(np.float32)


def as_bits(value: np.float32) -> np.uint32:
    return value.view(np.uint32)


def pack_bf16(low: np.float32, high: np.float32) -> np.uint32:
    return np.uint32(_bf16(low) | _bf16(high) << 16)


def exp2(x: np.float32) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(np.exp2(x))


def reciprocal(x: np.float32) -> np.float32:
    return np.float32(1) / x


def u64(value: int) -> int:
    return int(value) & _MASK


def hashed(word: int, place: int) -> int:
    z = int(word) ^ (int(place) * _GOLDEN & _MASK)
    for _ in range(2):
        z = (z ^ (z >> 32)) * _FACTOR & _MASK
    return z ^ (z >> 32)


def lane_swap(value: Any, step: int) -> Any:
    return _warp(value)[_place() % WARP ^ step]


def lane_get(value: Any, place: int) -> Any:
    return _warp(value)[place]


def warp_any(flag: bool) -> bool:
    return any(_warp(flag))


def lane_max(value: np.float32, lanes: int) -> np.float32:
    return np.float32(max(_neighbours(value, lanes)))


def lane_sum(value: np.float32, lanes: int) -> np.float32:
    total = np.float32(0)
    for each in _neighbours(value, lanes):
        total += each
    return total


def lane_sum_u64(value: int, lanes: int) -> int:
    return int(sum(_neighbours(value, lanes))) & _MASK


_exchanges: tuple[dict[int, Any], dict[int, Any]] = ({}, {})


def _neighbours(value: Any, lanes: int) -> list[Any]:
    """The values of the `lanes` threads that this one stands among."""
    place = _place()
    first = place % WARP // lanes * lanes
    return _warp(value)[first : first + lanes]


def _warp(value: Any) -> list[Any]:
    """The values of all threads of this one's warp. All threads of the thread block have to come here, not only the warp's."""
    thread: Any = threading.current_thread()
    turn = thread.turn = 1 - getattr(thread, "turn", 0)  # one may be writing the next value while another still reads
    place = _place()
    _exchanges[turn][place] = value
    thread.syncthreads()
    first = place // WARP * WARP
    return [_exchanges[turn].get(first + lane) for lane in range(WARP)]


def _place() -> int:
    thread: Any = threading.current_thread()
    return int(thread.threadIdx.x)


def _bf16(value: np.float32) -> int:
    """To nearest, ties to even: what is cut off, one more if the last bit kept is odd, carries into it."""
    bits = int(value.view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _extent(tensor: Tensor) -> int:
    return (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    )


_making_shared = threading.Lock()


def _shared_array(self: Any, shape: Any, dtype: Any) -> npt.NDArray[Any]:
    """The simulator's own, one thread at a time: two that come to an array at once would each make one, and lose the other's."""
    caller = sys._getframe(1)
    place = (caller.f_code.co_filename, caller.f_lineno)
    with _making_shared:
        if place not in self._allocations:
            self._allocations[place] = np.empty(shape, dtype)
        found: npt.NDArray[Any] = self._allocations[place]
        return found


FakeCUDAShared.array = _shared_array
