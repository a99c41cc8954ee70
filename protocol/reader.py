"""From bytes to frames, with each payload byte put where it belongs as it arrives.

Small frames land in one scratch buffer and are cut out of it. The bytes of a deferred message are received straight into their
place: the views that the asker registered, or memory made for them once the sizes have passed the limits. Payload nobody wants
any more is read and forgotten.

Knows frames and limits. Does not know connection states or what a body means: `Connection` decides where payload goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from protocol.frames import (
    FLAG_DEFERRED,
    HEADER,
    HEADER_BYTES,
    PLAIN_KINDS,
    Kind,
    Limits,
    ProtocolError,
    check_header,
    check_sizes,
    unpack_sizes,
)

DISCARD: Final = object()
Sinks: TypeAlias = "Sequence[memoryview] | object | None"
"""Where payload goes: given views, DISCARD, or None for memory made by the reader."""

_SCRATCH_BYTES: Final = 256 << 10
_SCRATCH_BYTES_IN_TRANSIT: Final = 4 << 10  # read little while chunks are due, so that little of them has to be copied
_GOODBYE: Final = int(Kind.GOODBYE)  # the last kind of the handshake
_DATA: Final = int(Kind.DATA)
_ABANDON: Final = int(Kind.ABANDON)


class Frame(msgspec.Struct, gc=False):
    """`body` may lie in the scratch buffer: it is good until the reader is given more bytes."""

    kind: int
    id: int
    body: memoryview | bytes
    buffers: tuple[memoryview | bytes, ...]
    discarded: bool = False  # there was payload, and it was forgotten


class FrameReader:
    """`choose_sinks(kind, id, sizes)` is asked once per message that has buffers."""

    def __init__(self, limits: Limits, choose_sinks: Callable[[int, int, Sequence[int]], Sinks]) -> None:
        self._limits = limits
        self._choose_sinks = choose_sinks
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = 0
        self._end = 0
        self._transfers: dict[int, _Transfer] = {}
        self._transit_bytes = 0
        self._direct: _Transfer | None = None  # whose chunk is being received
        self._chunk_left = 0
        self._finished: _Transfer | None = None  # complete, and not given out yet
        self.is_empty = True
        self.only_handshake = True

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes of the socket go. Never empty; the hint is not needed."""
        transfer = self._direct
        if transfer is not None:
            if transfer.discarding:
                return self._scratch[: self._chunk_left]
            return transfer.view()[: self._chunk_left]
        if self._start:
            left = self._end - self._start
            if left:
                self._scratch[:left] = self._scratch[self._start : self._end]
            self._start, self._end = 0, left
        if self._transfers and self._end < HEADER_BYTES:
            return self._scratch[self._end : _SCRATCH_BYTES_IN_TRANSIT]
        return self._scratch[self._end :]

    def buffer_updated(self, num_bytes: int) -> None:
        """`num_bytes` more bytes are in the last get_buffer(). Call next_frame() until it returns None, or `is_empty`."""
        self.is_empty = False
        transfer = self._direct
        if transfer is None:
            self._end += num_bytes
            return
        transfer.advance(num_bytes)
        self._chunk_left -= num_bytes
        if not self._chunk_left:
            self._direct = None
            if not transfer.left:
                self._finished = transfer

    def next_frame(self) -> Frame | None:
        """The next complete frame. Its scratch memory is reused by the next get_buffer()."""
        if self._finished is not None:
            finished, self._finished = self._finished, None
            return self._finish(finished)
        scratch, end = self._scratch, self._end
        while end - (pos := self._start) >= HEADER_BYTES and self._direct is None:
            kind, flags, num_buffers, body_bytes, frame_id = HEADER.unpack_from(scratch, pos)
            if self.only_handshake and kind > _GOODBYE:
                raise ProtocolError("bad_frame", f"frame kind {kind} before the handshake")
            start = pos + HEADER_BYTES
            if not (flags or num_buffers) and kind in PLAIN_KINDS and body_bytes <= self._limits.max_inline_bytes:
                # What nearly every frame is: all its checks in one line.
                stop = start + body_bytes
                if end < stop:
                    return None
                self._start = stop
                self.is_empty = stop == end
                return Frame(kind, frame_id, scratch[start:stop], ())
            check_header(kind, flags, num_buffers, body_bytes, self._limits)
            if kind == _DATA:
                transfer = self._take_chunk(frame_id, body_bytes, start)
                if not transfer.left:
                    return self._finish(transfer)
                continue
            frame = self._take_frame(kind, flags, num_buffers, body_bytes, frame_id)
            if frame is not None or self._start == pos:
                return frame
        return None

    def discard(self, transfer_id: int) -> None:
        """Nobody wants the payload of this id any more; its memory is not touched again."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.discard()

    def stop(self) -> None:
        """Forget everything; whatever arrives from now on goes to the scratch buffer and is not looked at."""
        for transfer in self._transfers.values():
            transfer.discard()
        self._transfers.clear()
        self._direct = self._finished = None
        self._start = self._end = 0

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def _take_frame(self, kind: int, flags: int, num_buffers: int, body_bytes: int, frame_id: int) -> Frame | None:
        """Any frame but DATA. None if it has not arrived whole, or was for the reader itself: then it has been taken."""
        start = self._start + HEADER_BYTES + 4 * num_buffers
        sizes: tuple[int, ...] = ()
        if num_buffers:
            if self._end < start:
                return None
            sizes = unpack_sizes(self._scratch, self._start + HEADER_BYTES, num_buffers)
        total = check_sizes(flags, body_bytes, sizes, self._limits)
        if flags & FLAG_DEFERRED:
            self._start = start
            self._open_transfer(kind, frame_id, body_bytes, sizes, total)
            return None
        if self._end < start + total:
            return None
        self._start = start + total
        body = self._scratch[start : start + body_bytes]
        if kind == _ABANDON:
            self._abandon(frame_id)
            return None
        if num_buffers:
            return self._cut(kind, frame_id, body, sizes, start + body_bytes)
        return Frame(kind, frame_id, body, ())

    def _cut(self, kind: int, frame_id: int, body: memoryview, sizes: Sequence[int], pos: int) -> Frame:
        """An inline message with buffers, copied out of the scratch buffer."""
        sinks = self._choose_sinks(kind, frame_id, sizes)
        if sinks is DISCARD:
            return Frame(kind, frame_id, body, (), True)
        buffers: list[memoryview | bytes] = []
        for index, size in enumerate(sizes):
            data = self._scratch[pos : pos + size]
            pos += size
            if sinks is None:
                buffers.append(bytes(data))
            else:
                sink = sinks[index]  # type: ignore[index]  # no narrowing by the identity of DISCARD
                sink[:] = data
                buffers.append(sink)
        return Frame(kind, frame_id, body, tuple(buffers))

    def _open_transfer(self, kind: int, frame_id: int, body_bytes: int, sizes: Sequence[int], total: int) -> None:
        limits = self._limits
        if frame_id in self._transfers:
            raise ProtocolError("bad_frame", f"two messages in transit for id {frame_id}")
        if len(self._transfers) >= limits.max_transfers or self._transit_bytes + total > limits.max_transit_bytes:
            most = f"{limits.max_transfers} messages or {limits.max_transit_bytes} bytes"
            raise ProtocolError("too_large", f"more than {most} in transit")
        sinks = self._choose_sinks(kind, frame_id, sizes) if sizes else None
        self._transfers[frame_id] = _Transfer(kind, frame_id, body_bytes, sizes, total, sinks)
        self._transit_bytes += total

    def _take_chunk(self, frame_id: int, chunk_bytes: int, pos: int) -> _Transfer:
        """Put what the scratch buffer already holds of a chunk in its place; the rest is received there."""
        transfer = self._transfers.get(frame_id)
        if transfer is None:
            raise ProtocolError("bad_frame", f"DATA for id {frame_id}, which has no message in transit")
        if not 0 < chunk_bytes <= min(self._limits.max_chunk_bytes, transfer.left):
            raise ProtocolError("too_large", f"DATA of {chunk_bytes} bytes where {transfer.left} are left")
        here = min(chunk_bytes, self._end - pos)
        self._start = pos + here
        transfer.put(self._scratch[pos : pos + here])
        if here < chunk_bytes:
            self._direct, self._chunk_left = transfer, chunk_bytes - here
        return transfer

    def _finish(self, transfer: _Transfer) -> Frame:
        self._close(transfer)
        return transfer.to_frame()

    def _abandon(self, frame_id: int) -> None:
        transfer = self._transfers.get(frame_id)
        if transfer is None:
            raise ProtocolError("bad_frame", f"ABANDON for id {frame_id}, which has no message in transit")
        self._close(transfer)

    def _close(self, transfer: _Transfer) -> None:
        del self._transfers[transfer.id]
        self._transit_bytes -= transfer.total


class _Transfer:
    """A deferred message on its way in. `left` counts down to its end."""

    __slots__ = ("_body", "_buffers", "_index", "_offset", "_targets", "discarding", "id", "kind", "left", "total")

    def __init__(self, kind: int, transfer_id: int, body_bytes: int, sizes: Sequence[int], total: int, sinks: Sinks) -> None:
        self.kind = kind
        self.id = transfer_id
        self.left = self.total = total
        self.discarding = sinks is DISCARD
        self._body = memoryview(bytearray(0 if self.discarding else body_bytes))
        if self.discarding:
            self._buffers: tuple[memoryview, ...] = ()
        elif sinks is None:
            self._buffers = tuple(memoryview(bytearray(size)) for size in sizes)
        else:
            self._buffers = tuple(sinks)  # type: ignore[arg-type]  # no narrowing by the identity of DISCARD
        self._targets = [target for target in (self._body, *self._buffers) if target.nbytes]
        self._index = 0
        self._offset = 0

    def view(self) -> memoryview:
        """The free rest of the buffer that is being filled."""
        return self._targets[self._index][self._offset :]

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` bytes have been written to view()."""
        self.left -= num_bytes
        if self.discarding:
            return
        self._offset += num_bytes
        if self._offset == self._targets[self._index].nbytes:
            self._index += 1
            self._offset = 0

    def put(self, data: memoryview) -> None:
        if self.discarding:
            self.left -= data.nbytes
            return
        while data.nbytes:
            target = self.view()
            count = min(target.nbytes, data.nbytes)
            target[:count] = data[:count]
            self.advance(count)
            data = data[count:]

    def discard(self) -> None:
        self.discarding = True
        self._targets = []
        self._buffers = ()

    def to_frame(self) -> Frame:
        return Frame(self.kind, self.id, self._body, self._buffers, self.discarding)
