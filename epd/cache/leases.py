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
        self._expires_at: dict[int, float] = {}
        self._due: list[tuple[float, int]] = []  # heap; an entry counts only while it agrees with _expires_at
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._block_ids)

    def add(self, block_ids: Sequence[int], expires_at: float) -> int:
        lease_id = self._next_id
        self._next_id += 1
        self._block_ids[lease_id] = tuple(block_ids)
        self._set_expiry(lease_id, expires_at)
        return lease_id

    def renew(self, lease_id: int, expires_at: float) -> bool:
        """Move a lease's expiry later, never earlier. False when there is no such lease any more."""
        if lease_id not in self._block_ids:
            return False
        if expires_at > self._expires_at[lease_id]:
            self._set_expiry(lease_id, expires_at)
        return True

    def pop(self, lease_id: int) -> tuple[int, ...] | None:
        """End a lease and return its blocks; None when it has ended before."""
        self._expires_at.pop(lease_id, None)
        return self._block_ids.pop(lease_id, None)

    def overdue(self, now: float) -> list[int]:
        """The leases whose time has come, for the caller to end. Each is told once."""
        found: list[int] = []
        while self._due and self._due[0][0] <= now:
            expires_at, lease_id = heapq.heappop(self._due)
            if self._expires_at.get(lease_id) == expires_at:
                found.append(lease_id)
        return found

    def owns(self, lease_id: int, block_ids: Sequence[int]) -> bool:
        """Whether the lease still stands and holds all of these blocks."""
        held = self._block_ids.get(lease_id)
        return held is not None and set(block_ids) <= set(held)

    def tables(self) -> list[tuple[int, ...]]:
        return list(self._block_ids.values())

    def _set_expiry(self, lease_id: int, expires_at: float) -> None:
        self._expires_at[lease_id] = expires_at
        heapq.heappush(self._due, (expires_at, lease_id))
        if len(self._due) > 64 + 4 * len(self._expires_at):
            self._due = [(at, lease) for lease, at in self._expires_at.items()]
            heapq.heapify(self._due)
