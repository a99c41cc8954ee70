"""Kernel: a Python function and its signature, compiled on its first launch for the device at hand, run on torch's stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.device import SIMULATED, UNIT_BYTES, address

# A decode step of few sequences has small grids, and does not get faster by being told so.
warnings.filterwarnings("ignore", message="Grid size .* low occupancy")


class Kernel:
    """`function` takes what `arguments` says, in Numba's names: addresses and counts are int64."""

    def __init__(
        self, function: Callable[..., None], arguments: str, num_threads: int, *, max_registers: int | None = None
    ) -> None:
        self.function = function
        self.signature = f"void({arguments})"
        self.num_threads = num_threads
        self.max_registers = max_registers
        self._compiled: dict[int, Any] = {}  # by device

    def launch(self, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        """On torch's current stream of `device`. A grid of nothing launches nothing.

        The first launch on a device compiles, and raises ImportError where there is no numba-cuda.
        """
        if 0 in grid:
            return
        if SIMULATED:
            cuda.jit(self.function)[grid, self.num_threads](*arguments)
            return
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(index):
            if index not in self._compiled:
                self._compiled[index] = self._compile()
            compiled = self._compiled[index]
            _configured(compiled, grid, self.num_threads, torch.cuda.current_stream(index).cuda_stream)(*arguments)

    def _compile(self) -> Any:
        if not find_spec("numba_cuda"):
            raise ImportError("the Numba kernels are compiled by the package numba-cuda, which is not installed")
        options = {"max_registers": self.max_registers} if self.max_registers else {}
        return cuda.jit(self.signature, **options)(self.function)


def units(tensor: Tensor) -> Any:
    """Its address, for access in units. Raises ValueError if it does not begin at one."""
    if tensor.data_ptr() % UNIT_BYTES:
        raise ValueError(f"a tensor at address {tensor.data_ptr()} does not begin at a multiple of {UNIT_BYTES} bytes")
    return address(tensor)


@lru_cache(maxsize=4096)
def _configured(compiled: Any, grid: tuple[int, ...], num_threads: int, stream: int) -> Any:
    """To be called with a kernel's arguments. `stream`: the handle of one that torch owns and keeps, 0 is the default stream."""
    return compiled[grid, num_threads, cuda.external_stream(stream) if stream else 0]
