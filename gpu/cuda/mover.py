"""Moves whole blocks of one device, between its pools and to and from the host, and proves them on the way.

Knows addresses, tensors and block numbers, all checked on the host before anything is launched. Does not know whose they are.
Block checksums are sum64 (`gpu.cuda.reference.sum64_rows`), computed where the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor, int64

from gpu.cuda.driver import Driver, HostBytes
from gpu.cuda.kernels import Kernels
from gpu.cuda.memory import PinnedMemory
from gpu.deferred import Deferred, Now
from gpu.pool import check_ids

_WORD = 8
_Launch = Callable[[Tensor], None]


class Mover:
    """All calls give their work to the calling thread's stream and return; what they compute comes when it has done it."""

    def __init__(self, driver: Driver, kernels: Kernels) -> None:
        self.pinned = PinnedMemory(driver)
        self._driver = driver
        self._kernels = kernels

    def copy(
        self, src: Tensor, src_ids: Sequence[int], dst: Tensor, dst_ids: Sequence[int], checksums: Sequence[int]
    ) -> Now[int]:
        """dst[dst_ids[i]] = src[src_ids[i]], uint8 [n, block_bytes]; the place of the first without its checksum, or -1."""
        ids = np.stack([check_ids(src_ids, len(src)), check_ids(dst_ids, len(dst))])
        if not len(src_ids):
            return -1
        sums = self._sums(ids, lambda words: self._kernels.copy_blocks(src, words[0], dst, words[1], words[2]))
        return _Proof(sums, checksums, (src, dst))

    def checksum(self, blocks: Tensor, block_ids: Sequence[int]) -> Now[list[int]]:
        ids = check_ids(block_ids, len(blocks))[None]
        if not len(block_ids):
            return []
        return _Sums(self._sums(ids, lambda words: self._kernels.hash_blocks(blocks, words[0], words[1])), blocks)

    def upload(self, landed: HostBytes, blocks: Tensor, block_ids: Sequence[int], checksums: Sequence[int]) -> Now[int]:
        """blocks[block_ids[i]] = the i-th block of `landed`, pinned; proven as in `copy`, by what then lies in the pool."""
        if len(checksums) != len(block_ids):
            raise ValueError(f"{len(checksums)} checksums for {len(block_ids)} blocks")
        ids, block_bytes, stream = check_ids(block_ids, len(blocks)), blocks.shape[1], self._driver.current_stream()
        for place, first, count in _runs(ids):
            part = landed[place * block_bytes : (place + count) * block_bytes]
            self._driver.copy_to_device(blocks.data_ptr() + first * block_bytes, part, stream)
        if not len(ids):
            return -1
        sums = self._sums(ids[None], lambda words: self._kernels.hash_blocks(blocks, words[0], words[1]))
        return _Proof(sums, checksums, (landed, blocks))

    def download(self, blocks: Tensor, block_ids: Sequence[int], stream: int) -> list[memoryview]:
        """The bytes of each block, in pinned memory. Blocks until `stream` has brought them."""
        ids, block_bytes = check_ids(block_ids, len(blocks)), blocks.shape[1]
        if not len(ids):
            return []
        landing = self.pinned.take(len(ids) * block_bytes)
        for place, first, count in _runs(ids):
            part = landing[place * block_bytes : (place + count) * block_bytes]
            self._driver.copy_to_host(part, blocks.data_ptr() + first * block_bytes, stream)
        self._driver.synchronize(stream)
        return rows_of(landing, block_bytes)

    def _sums(self, ids: npt.NDArray[np.int64], launch: _Launch) -> npt.NDArray[np.uint64]:
        """Bring ids [lists, k] to the device, launch with them and a row for k sums below them, bring the sums back.

        The array that is returned is filled when the stream has passed this point.
        """
        host = self.pinned.take((ids.size + ids.shape[1]) * _WORD)
        host[: ids.nbytes].view(np.int64)[:] = ids.reshape(-1)
        stream = self._driver.current_stream()
        device = self._driver.borrow(len(host))
        self._driver.copy_to_device(device.data_ptr(), host[: ids.nbytes], stream)
        launch(device.view(int64).view(len(ids) + 1, ids.shape[1]))
        self._driver.copy_to_host(host[ids.nbytes :], device.data_ptr() + ids.nbytes, stream)
        return host[ids.nbytes :].view(np.uint64)


def rows_of(memory: HostBytes, block_bytes: int) -> list[memoryview]:
    """`memory` block by block."""
    whole = memory.data
    return [whole[at : at + block_bytes] for at in range(0, len(memory), block_bytes)]


class _Proof(Deferred[int]):
    def __init__(self, sums: npt.NDArray[np.uint64], checksums: Sequence[int], held: object) -> None:
        """`held`: what the device reads and writes until then."""
        self._sums = sums
        self._checksums = checksums
        self._held = held

    def value(self) -> int:
        wrong = np.flatnonzero(self._sums != np.asarray(self._checksums, dtype=np.uint64))
        return int(wrong[0]) if len(wrong) else -1


class _Sums(Deferred[list[int]]):
    def __init__(self, sums: npt.NDArray[np.uint64], held: object) -> None:
        self._sums = sums
        self._held = held

    def value(self) -> list[int]:
        return [int(each) for each in self._sums]


def _runs(ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(place, first id, count) of each stretch of ids that follow one another: one copy each instead of one a block."""
    if not len(ids):
        return
    starts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    for start, end in pairwise(starts):
        yield start, int(ids[start]), end - start
