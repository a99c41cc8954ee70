"""The seam between the product and a device: memory, streams and copies.

A backend is complete: whatever is here works on each of them, held by the same tests.
"""

from __future__ import annotations

from typing import Protocol

from gpu.errors import UnknownDevice
from gpu.pool import Blocks, Pool, PoolExport, PoolSpec, Scratch
from gpu.stream import Stream


class Backend(Protocol):
    """One device."""

    @property
    def name(self) -> str:
        """ "cpu" or "cuda"."""

    @property
    def torch_device(self) -> str:
        """What torch calls it, for example "cuda:0"."""

    @property
    def dtype(self) -> str:
        """What weights, activations and KV are: "float32" or "bfloat16"."""

    @property
    def block_format(self) -> str:
        """How numbers and checksums of blocks are written: part of every layout fingerprint."""

    def open_stream(self, name: str, *, priority: int = 0) -> Stream: ...

    def allocate_pool(self, spec: PoolSpec) -> Pool: ...

    def allocate_scratch(self, num_blocks: int, block_bytes: int) -> Scratch: ...

    def map_pool(self, export: PoolExport) -> Blocks:
        """Another process's pool, to be copied from. Raises CannotMap."""

    def memory_budget(self) -> int:
        """Bytes that pools can still take."""

    def close(self) -> None: ...


def open_backend(device: str = "cpu") -> Backend:
    """The backend for a device as the command line names it: "cpu", "cuda" or "cuda:N". Raises UnknownDevice."""
    if device == "cpu":
        from gpu.cpu import CpuBackend

        return CpuBackend()
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdigit() or device == "cuda"):
        from gpu.cuda.backend import open_cuda

        return open_cuda(int(index or 0))
    raise UnknownDevice(f"there is no device {device!r}: choose cpu, cuda or cuda:N")
