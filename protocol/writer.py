"""From messages to the buffers that a socket is to be given, small frames first.

A message that is too big for one frame goes out as its sizes and then as chunks, one chunk of one message at a time, taken in
turns; what is sent meanwhile passes between two chunks. Payload buffers are handed on as they are: they belong to this writer,
and must not change, until the socket has taken them.

Knows frames and limits. Does not know connection states or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from protocol.frames import FLAG_DEFERRED, HEADER, Buffer, Kind, Limits, measure, pack_sizes

_DATA: Final = int(Kind.DATA)
_ABANDON: Final = int(Kind.ABANDON)


class FrameWriter:
    def __init__(self, limits: Limits, *, chunk_bytes: int) -> None:
        self._limits = limits
        self._chunk_bytes = min(chunk_bytes, limits.max_chunk_bytes)
        self._small: list[Buffer] = []
        self._small_bytes = 0
        self._transfers: dict[int, _Transfer] = {}  # every unfinished one; announced or waiting
        self.turns: deque[_Transfer] = deque()  # announced: a chunk is due
        self._waiting: deque[_Transfer] = deque()  # not announced yet: enough is in transit
        self._transit_bytes = 0

    def send(self, kind: int, frame_id: int, body: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Queue one message, after everything that was queued for the same id. MessageTooLarge: nothing was queued."""
        num_bytes = len(body)
        if not buffers and num_bytes <= self._limits.max_inline_bytes:
            piece = HEADER.pack(kind, 0, 0, num_bytes, frame_id) + body
            if not self._transfers:
                self._small.append(piece)
                self._small_bytes += len(piece)
                return
            frame: tuple[Buffer, ...] = (piece,)
        else:
            sizes, total = measure(body, buffers, self._limits)
            if total > self._limits.max_inline_bytes:
                self._send_deferred(_Transfer(kind, frame_id, body, buffers, sizes, total))
                return
            header = HEADER.pack(kind, 0, len(sizes), num_bytes, frame_id) + pack_sizes(sizes)
            frame = (header + body, *(flat(buffer) for buffer in buffers))
        ahead = self._transfers.get(frame_id) if self._transfers else None
        if ahead is None:
            self._queue(frame)
        else:
            ahead.followers.append(frame)

    def abandon(self, frame_id: int) -> None:
        """Send nothing more of this id's messages, and tell the other end if one of them stops midway."""
        transfer = self._transfers.pop(frame_id, None)
        if transfer is None:
            return
        if transfer in self._waiting:
            self._waiting.remove(transfer)
            return
        self.turns.remove(transfer)
        self._transit_bytes -= transfer.total
        self._queue((HEADER.pack(_ABANDON, 0, 0, 0, frame_id),))
        self._announce()

    def stop(self) -> None:
        """Send nothing more of messages in transit; what is whole and small still goes out."""
        self._transfers.clear()
        self.turns.clear()
        self._waiting.clear()
        self._transit_bytes = 0

    def data_to_send(self) -> list[Buffer]:
        """All small frames, then at most one chunk. Empty: there is nothing to send."""
        out, self._small = self._small, []
        self._small_bytes = 0
        if self.turns:
            transfer = self.turns.popleft()
            count = min(self._chunk_bytes, transfer.left)
            out.append(HEADER.pack(_DATA, 0, 0, count, transfer.id))
            transfer.take(count, out)
            if transfer.left:
                self.turns.append(transfer)
            else:
                self._finish(transfer)
        return out

    @property
    def small_bytes(self) -> int:
        return self._small_bytes

    @property
    def has_data(self) -> bool:
        return bool(self._small or self.turns)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def _queue(self, frame: tuple[Buffer, ...]) -> None:
        self._small += frame
        self._small_bytes += sum(map(len, frame))

    def _send_deferred(self, transfer: _Transfer) -> None:
        ahead = self._transfers.get(transfer.id)
        if ahead is not None:
            ahead.followers.append(transfer)
            return
        self._transfers[transfer.id] = transfer
        self._waiting.append(transfer)
        self._announce()

    def _announce(self) -> None:
        limits = self._limits
        while self._waiting and len(self.turns) < limits.max_transfers:
            transfer = self._waiting[0]
            if self._transit_bytes + transfer.total > limits.max_transit_bytes:
                return
            self._waiting.popleft()
            self._transit_bytes += transfer.total
            self.turns.append(transfer)
            self._queue((transfer.header,))

    def _finish(self, transfer: _Transfer) -> None:
        del self._transfers[transfer.id]
        self._transit_bytes -= transfer.total
        followers = transfer.followers
        while followers:
            follower = followers.popleft()
            if isinstance(follower, _Transfer):
                follower.followers = followers
                self._transfers[follower.id] = follower
                self._waiting.append(follower)
                break
            self._queue(follower)
        self._announce()


def flat(buffer: Buffer) -> Buffer:
    """The same bytes as one row of bytes. Raises TypeError for memory that is not contiguous."""
    if type(buffer) is not memoryview or (buffer.ndim == 1 and buffer.itemsize == 1):
        return buffer
    return buffer.cast("B") if buffer.nbytes else b""


class _Transfer:
    """A deferred message on its way out, and what was queued behind it for the same id."""

    __slots__ = ("_pieces", "followers", "header", "id", "left", "total")

    def __init__(
        self, kind: int, frame_id: int, body: bytes, buffers: Sequence[Buffer], sizes: Sequence[int], total: int
    ) -> None:
        self.id = frame_id
        self.left = self.total = total
        self.followers: deque[tuple[Buffer, ...] | _Transfer] = deque()
        self.header = HEADER.pack(kind, FLAG_DEFERRED, len(sizes), len(body), frame_id) + pack_sizes(sizes)
        self._pieces = deque(memoryview(flat(piece)) for piece in (body, *buffers) if len(piece))

    def take(self, count: int, out: list[Buffer]) -> None:
        """Move the next `count` bytes to `out`, as views."""
        self.left -= count
        pieces = self._pieces
        while count:
            piece = pieces[0]
            if piece.nbytes <= count:
                out.append(piece)
                count -= piece.nbytes
                pieces.popleft()
            else:
                out.append(piece[:count])
                pieces[0] = piece[count:]
                count = 0
