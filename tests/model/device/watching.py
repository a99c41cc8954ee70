"""Tells when the host reads a value of the device: the step that does has waited for all that was launched before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What torch does to bring a value to the host, or to learn from one how large a result is.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal", "repeat_interleave"}


class HostRead(AssertionError):
    """A value of the device was read."""


@contextmanager
def reads_are_errors(device: torch.device) -> Iterator[None]:
    """On a GPU torch itself tells; on the CPU operations that would have to wait are found by their names."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with _Watching():  # type: ignore[no-untyped-call]  # inherited by a class of ours: the exclusion is by module
        yield


class Unwatched:
    """Kernels whose twins read values, where the kernels themselves do not."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        if name == "fused" and found is not None:
            return Unwatched(found)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with _Watching.paused():
                return found(*args, **kwargs)

        return call


class _Watching(TorchDispatchMode):
    _num_paused = 0

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        cls._num_paused += 1
        try:
            yield
        finally:
            cls._num_paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(each is not None and each.dtype == torch.bool for each in args[1])
        if not self._num_paused and (name in _READS or by_mask):
            raise HostRead(f"{func} reads a value of the device")
        return func(*args, **(kwargs or {}))
