"""What a pool is, on any device: one allocation of equal blocks, which its owner alone writes and other processes may map.

Knows bytes, block numbers, who made the memory (generation) and what a block means (layout fingerprint). Does not know which
blocks are in use, by whom, or what is in them. `gpu.host_pool` is the one in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpu.deferred import Now
from gpu.errors import LayoutMismatch


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What a pool is to be. `layout` is the fingerprint of what a block means; both ends of a copy must agree on it."""

    num_blocks: int
    block_bytes: int
    kind: str  # "kv" | "embedding"
    layout: int

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_bytes < 1:
            raise ValueError(f"a pool needs blocks and bytes, not {self.num_blocks} of {self.block_bytes}")
        if not 0 <= self.layout < 1 << 64:
            raise ValueError(f"a layout fingerprint is an unsigned 64 bit number, not {self.layout}")


@dataclass(frozen=True, slots=True)
class PoolExport:
    """How a process on the same host finds a pool. `handle` is the word of the backend that made it to the one that maps it."""

    memory: str  # "memfd" | "cuda-ipc" | "cuda", which nobody can map
    handle: bytes
    num_blocks: int
    block_bytes: int
    generation: int
    layout: int


class Blocks(Protocol):
    """Blocks that can be copied from: an own pool, or another process's."""

    @property
    def layout(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def generation(self) -> int: ...

    def close(self) -> None: ...


class Landing(Protocol):
    """Host memory for blocks on their way from a socket to a device. On the host it is the blocks themselves."""

    @property
    def buffers(self) -> Sequence[memoryview]:
        """One per block, writable, block_bytes each."""

    def settle(self, checksums: Sequence[int]) -> Now[int]:
        """Bring what has landed to its blocks and prove it, on a stream: the place of the first wrong block, or -1."""


class Destination(Protocol):
    """Blocks that a transfer writes."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def copy_from(self, src: Blocks, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> Now[int]:
        """Copy block src_ids[i] to block dst_ids[i] and compare it with its checksum, on a stream.

        Returns the place of the first block whose bytes differ, or -1. Raises IndexError for ids outside of either, ValueError
        for blocks of another size, PoolClosed when the source has been closed.
        """

    def landing(self, block_ids: Sequence[int]) -> Landing: ...


class Pool(Destination, Blocks, Protocol):
    """Blocks that this process owns and others may map."""

    @property
    def kind(self) -> str: ...

    @property
    def is_host(self) -> bool:
        """Whether `read` gives views of the blocks at once. Elsewhere it copies and has to run on a stream."""

    def read(self, block_ids: Sequence[int]) -> Sequence[memoryview]:
        """The bytes of each block, for a socket."""

    def checksum(self, block_ids: Sequence[int]) -> Now[list[int]]:
        """Of each whole block, on a stream. Which sum it is belongs to the layout."""

    def export(self) -> PoolExport: ...

    def check_integrity(self) -> None:
        """Raises BrokenPool when the memory is not the one that this pool made, or when something wrote past its blocks."""


class Scratch(Destination, Protocol):
    """Blocks for this process alone and for a short while: gone when the last array over them has gone."""

    def rows(self, width: int) -> Any:
        """All blocks as rows [n, width] of the backend's dtype: a NumPy array on the host, a torch tensor on a device."""


def check_copy(src: Blocks, dst: Destination, src_ids: Sequence[int], dst_ids: Sequence[int], checksums: Sequence[int]) -> None:
    """Raises LayoutMismatch or ValueError for a copy that makes no sense whatever the ids are."""
    if src.block_bytes != dst.block_bytes:
        raise LayoutMismatch(f"blocks of {src.block_bytes} bytes cannot go where blocks of {dst.block_bytes} lie")
    if not len(src_ids) == len(dst_ids) == len(checksums):
        raise ValueError("a copy needs as many destinations and checksums as sources")


def check_ids(block_ids: Sequence[int], num_blocks: int) -> npt.NDArray[np.int64]:
    """The ids as an array. Raises IndexError when one is outside of [0, num_blocks)."""
    ids = np.asarray(block_ids, dtype=np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= num_blocks):
        raise IndexError(f"block ids {ids.min()}..{ids.max()} are not all inside a pool of {num_blocks} blocks")
    return ids
