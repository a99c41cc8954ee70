"""Reads tensors of a checkpoint straight to where they will be used, at the speed of the disk.

Shards are read front to back in large pieces by a few threads, each into a staging buffer (pinned where the target is a GPU) that
is used over and over: while one piece is on its way to the device and converted there, others are read. Host memory: the staging
buffers. Device memory beyond the tensors: one staging buffer, and none where the file has the dtype that is wanted.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from epd.errors import BadCheckpoint
from epd.model.checkpoint import Entry

NUM_READERS = 4
STAGING_BYTES = 16 << 20
_PAGE = 4096  # reads begin at a multiple of it
_GAP_BYTES = 1 << 20  # so much that nobody wants is read along rather than a new read begun


def upload(
    entries: Mapping[str, Entry],
    target_of: Callable[[str], Tensor],
    progress: Callable[[int, int], None],
    *,
    num_readers: int = NUM_READERS,
    staging_bytes: int = STAGING_BYTES,
) -> None:
    """Fill the contiguous tensors `target_of(name)`, which are all on one device, from their entries, converting to their dtype.

    Returns when the device has them. `progress` is called on this thread. Raises BadCheckpoint for a file that cannot be read.
    """
    targets = {name: target_of(name).view(-1) for name in entries}
    chunks = _plan(entries, targets, staging_bytes)
    device = next(iter(targets.values())).device
    converts = any(entry.dtype != targets[name].dtype for name, entry in entries.items())
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in {chunk.path for chunk in chunks}}
        way = _CudaWay(device, staging_bytes if converts else 0) if device.type == "cuda" else _HostWay()
        stack.callback(way.finish)
        stagings: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        for _ in range(min(num_readers, len(chunks))):
            stagings.put(_Staging(device, staging_bytes))

        def load(chunk: _Chunk) -> int:
            staging = stagings.get()
            try:
                staging.wait()
                _read(files[chunk.path], chunk, staging.view)
                way.send(chunk.pieces, staging)
            finally:
                stagings.put(staging)
            return chunk.num_finished

        done = 0
        readers = stack.enter_context(ThreadPoolExecutor(num_readers, thread_name_prefix="weights"))
        stack.callback(readers.shutdown, wait=True, cancel_futures=True)
        for num_finished in readers.map(load, chunks):
            for _ in range(num_finished):
                done += 1
                progress(done, len(entries))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Numbers of one tensor in a chunk: from byte `start` of what was read, in the file's dtype."""

    target: Tensor
    dtype: torch.dtype
    start: int

    @property
    def end(self) -> int:
        return self.start + self.target.numel() * self.dtype.itemsize


@dataclass(slots=True)
class _Chunk:
    """What one read brings: the file's bytes from `offset`."""

    path: Path
    offset: int
    num_bytes: int = 0
    pieces: list[_Piece] = field(default_factory=list)
    num_finished: int = 0  # tensors whose last piece is here


def _plan(entries: Mapping[str, Entry], targets: Mapping[str, Tensor], staging_bytes: int) -> list[_Chunk]:
    """Shard by shard and front to back; no number lies across two chunks."""
    chunks: list[_Chunk] = []
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].offset)):
        size, count, first = entry.dtype.itemsize, math.prod(entry.shape), 0
        while first < count:
            at = entry.offset + first * size
            chunk = chunks[-1] if chunks else None
            if chunk is None or not _reaches(chunk, entry.path, at, size, staging_bytes):
                chunk = _Chunk(entry.path, at // _PAGE * _PAGE)
                chunks.append(chunk)
            start = at - chunk.offset
            last = min(count, first + (staging_bytes - start) // size)
            chunk.pieces.append(_Piece(targets[name][first:last], entry.dtype, start))
            chunk.num_bytes = start + (last - first) * size
            chunk.num_finished += last == count
            first = last
    return chunks


def _reaches(chunk: _Chunk, path: Path, at: int, size: int, staging_bytes: int) -> bool:
    start = at - chunk.offset
    return chunk.path == path and chunk.num_bytes <= start <= min(chunk.num_bytes + _GAP_BYTES, staging_bytes - size)


def _open(path: Path, stack: ExitStack) -> int:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from error
    stack.callback(os.close, file)
    return file


def _read(file: int, chunk: _Chunk, into: memoryview) -> None:
    """Ask for all of it at once, so that the disk has something to do, then take it."""
    got = 0
    try:
        os.posix_fadvise(file, chunk.offset, chunk.num_bytes, os.POSIX_FADV_WILLNEED)
        while got < chunk.num_bytes:
            num_bytes = os.preadv(file, [into[got : chunk.num_bytes]], chunk.offset + got)
            if num_bytes == 0:
                raise BadCheckpoint(f"{chunk.path} is cut off: it ends at byte {chunk.offset + got} while it is being read")
            got += num_bytes
    except OSError as error:
        raise BadCheckpoint(f"{chunk.path} cannot be read: {error}") from error


class _Staging:
    """Host memory that a read lands in, and when the device has taken it from there."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.bytes = staging_memory(num_bytes, device)
        self.view = memoryview(self.bytes.numpy())  # type: ignore[arg-type]  # an array is a buffer
        self.taken: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.taken is not None:
            self.taken.synchronize()


def staging_memory(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes] on the host, from which a copy to `device` needs no detour: pinned for a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


class _HostWay:
    """To host memory: readers convert side by side."""

    def send(self, pieces: Sequence[_Piece], staging: _Staging) -> None:
        for piece in pieces:
            source = staging.bytes[piece.start : piece.end]
            if piece.start % piece.dtype.itemsize:
                source = source.clone()  # to where a number may begin
            piece.target.copy_(source.view(piece.dtype))

    def finish(self) -> None:
        pass


class _CudaWay:
    """To a GPU: one stream, on which a piece is copied, then converted from the device's own staging buffer."""

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # whatever used the targets' memory before
        self._staging = torch.empty(staging_bytes, dtype=torch.uint8, device=device)
        self._lock = threading.Lock()

    def send(self, pieces: Sequence[_Piece], staging: _Staging) -> None:
        with self._lock, torch.cuda.stream(self._stream):
            for piece in pieces:
                source = staging.bytes[piece.start : piece.end]
                if piece.dtype == piece.target.dtype:
                    piece.target.view(torch.uint8).copy_(source, non_blocking=True)
                else:
                    arrived = self._staging[: len(source)]
                    arrived.copy_(source, non_blocking=True)
                    piece.target.copy_(arrived.view(piece.dtype))
            staging.taken = torch.cuda.Event()
            staging.taken.record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()
