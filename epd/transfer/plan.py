"""How bytes get from one worker to another: the decision, without the bytes.

The ladder, best first: `local` (the pool is this process's own: of KV the block table moves and no byte does, embeddings are
copied), `mapped` (one host: the receiver maps the sender's pool and copies out of it), `socket` (another host, or a pool that
cannot be mapped: the owner sends the blocks over the link).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

from epd.errors import StaleHandle
from protocol.messages import EmbeddingRef, Endpoint, KVRef, PoolRef

MAX_FETCH_BYTES = 32 * 2**20
"""Asked for in one piece over a socket, so that a cancelled transfer wastes little and others get their turn."""

Ref = KVRef | EmbeddingRef


class Rung(StrEnum):
    LOCAL = "local"
    MAPPED = "mapped"
    SOCKET = "socket"


def may_map(own: Endpoint, source: Endpoint, *, allowed: str) -> bool:
    """Whether to try and map the source's pools. `allowed` is the operator's bound ("auto", "mapped", "socket")."""
    same_host = own.host_id != "" and own.host_id == source.host_id
    return same_host and allowed in ("auto", "mapped")


def kind_of(ref: Ref) -> str:
    return "kv" if isinstance(ref, KVRef) else "embedding"


def check_handle(ref: Ref, pool: PoolRef) -> None:
    """Refuse a handle that does not fit the pool that its worker has now.

    Raises:
        StaleHandle: made for another generation or layout, or pointing outside the pool.
    """
    if ref.generation != pool.generation:
        raise StaleHandle(f"handle of {ref.worker} is from a {kind_of(ref)} pool that is gone")
    if ref.layout != pool.layout:
        raise StaleHandle(f"handle of {ref.worker} has layout {ref.layout:#x}, its pool {pool.layout:#x}")
    if any(not 0 <= block_id < pool.num_blocks for block_id in ref.block_ids):
        raise StaleHandle(f"handle of {ref.worker} names blocks outside its pool of {pool.num_blocks}")
    if len(ref.checksums) != len(ref.block_ids):
        raise StaleHandle(f"handle of {ref.worker} has {len(ref.checksums)} checksums for {len(ref.block_ids)} blocks")


def pieces(block_ids: Sequence[int], block_bytes: int, *, max_bytes: int = MAX_FETCH_BYTES) -> Iterator[slice]:
    """Runs of `block_ids` of at most `max_bytes` each, at least one block a run."""
    step = max(1, max_bytes // max(1, block_bytes))
    for start in range(0, len(block_ids), step):
        yield slice(start, min(start + step, len(block_ids)))
