"""Leases: blocks that are held for somebody outside this process, until released or overdue.

Owns: which lease holds which blocks, and until when. Knows: times as numbers that the caller reads off its own clock. Does not
know: reference counts (the block pool keeps them), who the holder is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class LeaseTable:
    """Numbered leases. Ids are never used twice, so that a late release cannot hit somebody else's lease."""

    def __init__(self) -> None:
        self._block_ids: dict[int, tuple[int, ...]] = {}
        self._due: list[tuple[float, int]] = []  # heap of expiries, also of leases that have been ended before
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._block_ids)

    def add(self, block_ids: Sequence[int], expires_at: float) -> int:
        lease_id = self._next_id
        self._next_id += 1
        self._block_ids[lease_id] = tuple(block_ids)
        heapq.heappush(self._due, (expires_at, lease_id))
        if len(self._due) > 64 + 4 * len(self._block_ids):
            self._due = [(at, lease) for at, lease in self._due if lease in self._block_ids]
            heapq.heapify(self._due)
        return lease_id

    def pop(self, lease_id: int) -> tuple[int, ...] | None:
        """End a lease and return its blocks; None when it has ended before."""
        return self._block_ids.pop(lease_id, None)

    def overdue(self, now: float) -> list[int]:
        """The leases whose time has come, for the caller to end. Each is told once."""
        found: list[int] = []
        while self._due and self._due[0][0] <= now:
            _, lease_id = heapq.heappop(self._due)
            if lease_id in self._block_ids:
                found.append(lease_id)
        return found

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool:
        """Whether the lease still stands and holds all of these blocks."""
        held = self._block_ids.get(lease_id)
        return held is not None and set(block_ids) <= set(held)

    def tables(self) -> list[tuple[int, ...]]:
        return list(self._block_ids.values())
