"""The block pool: which of a pool's blocks are free, held, cached or leased. Numbers only, no memory.

A block is in exactly one of three places: free (nothing in it), referenced (somebody holds it), or evictable (nobody holds it,
but its content is published under a hash and may be asked for again). Allocation takes free blocks first and then evicts the
block that has been evictable longest. Content is published under chained hashes (see `prefix`): a lookup walks along a chain.

Owns: reference counts, published hashes, leases. Does not know: requests, tokens, bytes. The caller's tables say who holds what;
`check_integrity` compares them with the counts.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from epd.cache.leases import LeaseTable
from epd.errors import InternalError


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What a lookup would find: the length of the cached prefix, and how many of its blocks count as free now."""

    num_blocks: int
    num_evictable: int


class BlockPool:
    """Every method either does all of what it says or raises and changes nothing."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InternalError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.cache_queries = 0  # blocks asked for by lookup()
        self.cache_hits = 0  # of these, found
        self.num_evictions = 0  # blocks whose published content gave way to other content
        self._refs = [0] * num_blocks
        self._hashes: list[int | None] = [None] * num_blocks
        self._cached: dict[int, int] = {}  # hash -> block id
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; low numbers first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._leases = LeaseTable()

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give: empty or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    # --- references -------------------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks with one reference each and nothing published; None, and nothing is taken, when there are too few."""
        if num_blocks < 0:
            raise InternalError(f"cannot allocate {num_blocks} blocks")
        if num_blocks > self.num_free:
            return None
        taken: list[int] = []
        for _ in range(num_blocks):
            if not self._free:
                self._free.append(self._evict())
                self.num_evictions += 1
            block_id = self._free.pop()
            self._refs[block_id] = 1
            taken.append(block_id)
        return taken

    def take(self, block_ids: Sequence[int]) -> None:
        """One more reference to blocks that somebody holds already."""
        self._require_held(block_ids)
        for block_id in block_ids:
            self._refs[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Give one reference back per block. Content that is published stays until the space is needed."""
        self._require_held(block_ids)
        # Backwards: the end of a chain is of no use without its beginning, so it is to be evicted first.
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                if self._hashes[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._evictable[block_id] = None

    # --- the prefix cache -------------------------------------------------------------------------------------------

    def cache(self, block_id: int, block_hash: int) -> bool:
        """Publish a full block that the caller holds. False when another block has this content published already."""
        self._require_held((block_id,))
        known = self._hashes[block_id]
        if known is not None and known != block_hash:
            raise InternalError(f"block {block_id} is published under another hash")
        holder = self._cached.setdefault(block_hash, block_id)
        if holder != block_id:
            return False
        self._hashes[block_id] = block_hash
        return True

    def lookup(self, hashes: Sequence[int]) -> list[int]:
        """The blocks of the longest cached prefix of a hash chain, one reference taken on each."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            if self._refs[block_id] == 0:
                del self._evictable[block_id]
            self._refs[block_id] += 1
            found.append(block_id)
        self.cache_queries += len(hashes)
        self.cache_hits += len(found)
        return found

    def peek(self, hashes: Sequence[int]) -> CachedPrefix:
        """What lookup() would find, with nothing taken."""
        num_blocks = num_evictable = 0
        for block_hash in hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            num_blocks += 1
            num_evictable += self._refs[block_id] == 0
        return CachedPrefix(num_blocks, num_evictable)

    # --- leases -----------------------------------------------------------------------------------------------------

    def lease(self, block_ids: Sequence[int], expires_at: float) -> int:
        """Hold blocks for somebody outside until the lease is released or expires. Returns the lease's id."""
        self.take(block_ids)
        return self._leases.add(block_ids, expires_at)

    def release(self, lease_id: int, *, is_corrupt: bool = False) -> bool:
        """End a lease. False, and no error, when it had ended already.

        With `is_corrupt` nothing that is published can be trusted any more: nobody knows which blocks were computed from the
        spoilt ones, and it may be the memory that is at fault.
        """
        block_ids = self._leases.pop(lease_id)
        if block_ids is None:
            return False
        if is_corrupt:
            self._forget_published()
        self.free(block_ids)
        return True

    def expire(self, now: float) -> list[int]:
        """End all leases whose time has come; returns their ids."""
        overdue = self._leases.overdue(now)
        for lease_id in overdue:
            self.release(lease_id)
        return overdue

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool:
        """Whether the lease still stands and holds all of these blocks: what a fetch must be checked against."""
        return self._leases.owns(lease_id, block_ids)

    # --- proof ------------------------------------------------------------------------------------------------------

    def is_idle(self) -> bool:
        """Nothing is held and nothing is leased; cached content may remain."""
        return self.num_free == self.num_blocks and not len(self._leases)

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Compare everything that is written down twice. With `tables` (every block table that anybody in this process holds)
        the reference counts are compared too.

        Raises:
            InternalError: naming what is wrong.
        """
        wrong = [*self._wrong_places(), *self._wrong_hashes(), *self._wrong_counts(tables)]
        if wrong:
            raise InternalError("block pool: " + "; ".join(wrong))

    def _wrong_places(self) -> Iterable[str]:
        free, evictable = set(self._free), self._evictable.keys()
        held = {block_id for block_id, refs in enumerate(self._refs) if refs}
        if len(free) != len(self._free):
            yield "a block is free twice"
        if free & evictable or free & held or evictable & held:
            yield f"in two places: {sorted(free & evictable | free & held | evictable & held)}"
        if len(free) + len(evictable) + len(held) < self.num_blocks:
            yield f"lost: {sorted(set(range(self.num_blocks)) - free - evictable - held)}"
        if held and min(self._refs) < 0:
            yield "a block has fewer than no references"

    def _wrong_hashes(self) -> Iterable[str]:
        num_published = self.num_blocks - self._hashes.count(None)
        if num_published != len(self._cached) or any(self._hashes[block_id] != name for name, block_id in self._cached.items()):
            yield "published hashes and blocks disagree"
        if any(self._hashes[block_id] is None for block_id in self._evictable):
            yield "an evictable block is not published"
        if any(self._hashes[block_id] is not None for block_id in self._free):
            yield "a free block is published"

    def _wrong_counts(self, tables: Iterable[Sequence[int]] | None) -> Iterable[str]:
        leased = Counter(block_id for table in self._leases.tables() for block_id in table)
        for block_id, num_leases in leased.items():
            if self._refs[block_id] < num_leases:
                yield f"block {block_id} has {self._refs[block_id]} references, its leases alone {num_leases}"
        if tables is None:
            return
        held = Counter(leased)
        for table in tables:
            held.update(table)
        for block_id, refs in enumerate(self._refs):
            if refs != held.get(block_id, 0):
                yield f"block {block_id} has {refs} references, its holders {held[block_id]}"

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        block_hash = self._hashes[block_id]
        if block_hash is None:
            raise InternalError(f"evictable block {block_id} is not published")
        del self._cached[block_hash]
        self._hashes[block_id] = None
        return block_id

    def _forget_published(self) -> None:
        self._free += self._evictable
        self._evictable.clear()
        self._cached.clear()
        self._hashes = [None] * self.num_blocks

    def _require_held(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks or self._refs[block_id] < 1:
                raise InternalError(f"block {block_id} is held by nobody")
        if len(set(block_ids)) != len(block_ids):
            raise InternalError(f"a block is named twice: {list(block_ids)}")
