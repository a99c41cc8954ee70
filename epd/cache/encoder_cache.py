"""The encoder cache: which image's embedding lies in which blocks of an embedding pool.

An embedding is pending (blocks reserved, being encoded) or ready. Ready ones stay until their space is needed; the one unused for
longest goes first, as a whole, and never one that a lease holds. Two asks for one image find the same pending entry, so that it
is encoded once.

Owns: the entries and their blocks. Knows: lease expiries as the caller's `now` numbers. Does not know: rows, bytes, who asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from epd.cache.block_pool import BlockPool
from epd.errors import InternalError


@dataclass(frozen=True, slots=True)
class Embedding:
    """A ready embedding: `num_tokens` rows over `block_ids`, with a checksum per whole block."""

    mm_hash: str
    num_tokens: int
    block_ids: tuple[int, ...]
    checksums: tuple[int, ...]


class EncoderCache:
    """Takes over a whole pool; nobody else allocates from it."""

    def __init__(self, pool: BlockPool, *, block_rows: int) -> None:
        self.cache_queries = 0  # calls of get()
        self.cache_hits = 0
        self.num_evictions = 0  # blocks of embeddings that gave way to others
        self._pool = pool
        self._block_rows = block_rows
        self._pending: dict[str, tuple[int, tuple[int, ...]]] = {}  # mm_hash -> num_tokens, blocks
        self._ready: dict[str, Embedding] = {}
        self._unleased: OrderedDict[str, None] = OrderedDict()  # ready and evictable, longest unused first
        self._leases: dict[int, str] = {}
        self._num_leases: dict[str, int] = {}  # of ready embeddings that have any
        self._num_unleased_blocks = 0

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that reserve() can give: empty, or of embeddings that nobody leases."""
        return self._pool.num_free + self._num_unleased_blocks

    @property
    def num_cached_blocks(self) -> int:
        return sum(len(embedding.block_ids) for embedding in self._ready.values())

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_rows)

    # --- embeddings -------------------------------------------------------------------------------------------------

    def get(self, mm_hash: str) -> Embedding | None:
        """The ready embedding of an image; it counts as used now."""
        self.cache_queries += 1
        embedding = self._ready.get(mm_hash)
        if embedding is None:
            return None
        self.cache_hits += 1
        if mm_hash in self._unleased:
            self._unleased.move_to_end(mm_hash)
        return embedding

    def reserve(self, mm_hash: str, num_tokens: int) -> tuple[int, ...] | None:
        """Blocks for an image that is to be encoded now, evicting as little as it takes. None while leases leave too little room.

        Whoever takes images in refuses those that need more than `num_blocks`: no end of a lease would make room for them.
        """
        if mm_hash in self._pending or mm_hash in self._ready:
            raise InternalError(f"image {mm_hash} is in the encoder cache already")
        num_blocks = self.num_blocks_of(num_tokens)
        if num_blocks > self.num_free_blocks:
            return None
        while self._pool.num_free < num_blocks:
            self.num_evictions += self._evict(next(iter(self._unleased)))
        taken = self._pool.allocate(num_blocks)
        if taken is None:
            raise InternalError("the embedding pool miscounted its free blocks")
        self._pending[mm_hash] = (num_tokens, tuple(taken))
        return tuple(taken)

    def pending_blocks(self, mm_hash: str) -> tuple[int, ...]:
        """The blocks that were reserved for an image that is being encoded."""
        if mm_hash not in self._pending:
            raise InternalError(f"image {mm_hash} is not being encoded")
        return self._pending[mm_hash][1]

    def fill(self, mm_hash: str, checksums: Sequence[int]) -> Embedding:
        """A pending embedding's rows are in its blocks now."""
        if mm_hash not in self._pending:
            raise InternalError(f"image {mm_hash} is not being encoded")
        num_tokens, block_ids = self._pending[mm_hash]
        if len(checksums) != len(block_ids):
            raise InternalError(f"{len(checksums)} checksums for the {len(block_ids)} blocks of image {mm_hash}")
        del self._pending[mm_hash]
        embedding = Embedding(mm_hash, num_tokens, block_ids, tuple(checksums))
        self._ready[mm_hash] = embedding
        self._set_unleased(embedding)
        return embedding

    def fail(self, mm_hash: str) -> None:
        """A pending embedding will not come."""
        if mm_hash not in self._pending:
            raise InternalError(f"image {mm_hash} is not being encoded")
        _, block_ids = self._pending.pop(mm_hash)
        self._pool.free(block_ids)

    # --- leases -----------------------------------------------------------------------------------------------------

    def lease(self, mm_hash: str, expires_at: float) -> int:
        """Keep a ready embedding for somebody outside. Every handle given out has a lease of its own."""
        embedding = self._ready.get(mm_hash)
        if embedding is None:
            raise InternalError(f"image {mm_hash} has no embedding to lease")
        lease_id = self._pool.lease(embedding.block_ids, expires_at)
        self._leases[lease_id] = mm_hash
        if mm_hash in self._unleased:
            del self._unleased[mm_hash]
            self._num_unleased_blocks -= len(embedding.block_ids)
        self._num_leases[mm_hash] = self._num_leases.get(mm_hash, 0) + 1
        return lease_id

    def release(self, lease_id: int, *, is_corrupt: bool = False) -> bool:
        """End a lease. False, and no error, when it had ended already. If `is_corrupt`, the embedding goes with the last."""
        if not self._pool.release(lease_id):
            return False
        mm_hash = self._leases[lease_id]
        self._end(lease_id)
        if is_corrupt and mm_hash in self._unleased:
            self._evict(mm_hash)
        return True

    def expire(self, now: float) -> list[int]:
        """End all leases whose time has come; returns their ids."""
        expired = self._pool.expire(now)
        for lease_id in expired:
            self._end(lease_id)
        return expired

    def has_lease(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool:
        """Whether the lease still stands and holds all of these blocks."""
        return self._pool.owns(lease_id, block_ids)

    # --- proof ------------------------------------------------------------------------------------------------------

    def is_idle(self) -> bool:
        return not self._pending and not self._leases

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        wrong = list(self._wrong())
        if wrong:
            raise InternalError("encoder cache: " + "; ".join(wrong))
        tables = [block_ids for _, block_ids in self._pending.values()]
        self._pool.check_integrity([*tables, *(embedding.block_ids for embedding in self._ready.values())])

    def _wrong(self) -> Iterable[str]:
        if self._pending.keys() & self._ready.keys():
            yield "an image is pending and ready at once"
        if self._unleased.keys() != self._ready.keys() - self._num_leases.keys():
            yield "what is evictable is not what is ready and unleased"
        unleased = self._unleased & self._ready.keys()
        if self._num_unleased_blocks != sum(len(self._ready[mm_hash].block_ids) for mm_hash in unleased):
            yield "evictable blocks are miscounted"
        counted: dict[str, int] = {}
        for mm_hash in self._leases.values():
            counted[mm_hash] = counted.get(mm_hash, 0) + 1
        if counted != self._num_leases:
            yield "leases per image are miscounted"
        if len(self._leases) != self._pool.num_leases:
            yield f"{len(self._leases)} leases here and {self._pool.num_leases} in the pool"

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _end(self, lease_id: int) -> None:
        mm_hash = self._leases.pop(lease_id)
        self._num_leases[mm_hash] -= 1
        if self._num_leases[mm_hash] == 0:
            del self._num_leases[mm_hash]
            self._set_unleased(self._ready[mm_hash])

    def _set_unleased(self, embedding: Embedding) -> None:
        self._unleased[embedding.mm_hash] = None
        self._num_unleased_blocks += len(embedding.block_ids)

    def _evict(self, mm_hash: str) -> int:
        del self._unleased[mm_hash]
        embedding = self._ready.pop(mm_hash)
        self._num_unleased_blocks -= len(embedding.block_ids)
        self._pool.free(embedding.block_ids)
        return len(embedding.block_ids)
