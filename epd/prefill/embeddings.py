"""Brings image embeddings from encode workers into this process, as rows that a step can read."""

from __future__ import annotations

from collections.abc import Callable

from epd.errors import EpdError, StaleHandle, Unavailable
from epd.microkernel.system import System
from epd.step import Rows
from epd.transfer.receiver import Receiver
from gpu.errors import OutOfMemory
from gpu.pool import Scratch
from protocol.messages import Address, EmbeddingRef, Endpoint, MMItem, ReleaseLease


class EmbeddingFetcher:
    """Knows the shape of an embedding block: `block_rows` rows of `width` numbers. `allocate`: memory for so many blocks."""

    def __init__(
        self,
        system: System,
        receiver: Receiver,
        *,
        allocate: Callable[[int], Scratch],
        block_rows: int,
        width: int,
        layout: int,
    ) -> None:
        self._system = system
        self._receiver = receiver
        self._allocate = allocate
        self._block_rows = block_rows
        self._width = width
        self._layout = layout

    async def fetch(self, ref: EmbeddingRef, source: Endpoint, item: MMItem) -> Rows:
        """Rows [num_tokens, width] of an item's embedding.

        Raises:
            StaleHandle, CorruptTransfer, PeerLost: it is to be encoded again.
            Unavailable: there is no memory for it now, and there will be when steps have read what is here.
        """
        if ref.layout != self._layout:
            raise StaleHandle(f"{ref.worker} encodes for another model")
        if ref.mm_hash != item.mm_hash:
            raise StaleHandle(f"{ref.worker} has the embedding of {ref.mm_hash}, not of {item.mm_hash}")
        if ref.num_tokens != item.num_tokens or len(ref.block_ids) * self._block_rows < ref.num_tokens:
            raise StaleHandle(f"{ref.worker} has {ref.num_tokens} rows for an image of {item.num_tokens} tokens")
        try:
            scratch = self._allocate(len(ref.block_ids))
        except OutOfMemory as error:
            raise Unavailable(f"no memory for the embedding of another image: {error}") from error
        await self._receiver.pull(ref, source, scratch, range(len(ref.block_ids)))
        rows: Rows = scratch.rows(self._width)[: ref.num_tokens]
        return rows

    async def release(self, ref: EmbeddingRef, source: Endpoint, *, is_corrupt: bool = False) -> None:
        """Tell the encode worker that it may evict, or has to; it finds out by itself, later, if it does not hear this."""
        try:
            self._system.introduce(source)  # where nothing was fetched nobody has yet
            await self._system.tell(Address(ref.worker, "encode"), ReleaseLease(ref.lease_id, is_corrupt), timeout_s=1.0)
        except EpdError:
            pass
