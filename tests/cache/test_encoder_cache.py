"""The encoder cache against tables and against a slow, obvious twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.cache.block_pool import BlockPool
from epd.cache.encoder_cache import Embedding, EncoderCache
from epd.errors import InternalError

ROWS = 10


def a_cache(num_blocks: int) -> EncoderCache:
    return EncoderCache(BlockPool(num_blocks), block_rows=ROWS)


def encoded(cache: EncoderCache, mm_hash: str, num_blocks: int) -> Embedding:
    taken = cache.reserve(mm_hash, num_blocks * ROWS)
    assert taken is not None
    return cache.fill(mm_hash, [0] * num_blocks)


def test_an_image_is_pending_until_it_is_filled() -> None:
    cache = a_cache(4)
    assert cache.get("a") is None
    taken = cache.reserve("a", 2 * ROWS + 1)
    assert taken is not None
    assert len(taken) == 3
    assert cache.pending_blocks("a") == taken
    assert cache.get("a") is None
    assert not cache.is_idle()
    embedding = cache.fill("a", (7, 8, 9))
    assert embedding == Embedding("a", 2 * ROWS + 1, taken, (7, 8, 9))
    with pytest.raises(InternalError, match="not being encoded"):
        cache.pending_blocks("a")
    assert cache.get("a") == embedding
    assert cache.is_idle()
    assert (cache.num_free_blocks, cache.num_cached_blocks) == (4, 3)
    assert (cache.cache_hits, cache.cache_queries) == (1, 3)


def test_a_failed_image_leaves_nothing() -> None:
    cache = a_cache(2)
    cache.reserve("a", 2 * ROWS)
    cache.fail("a")
    assert cache.is_idle()
    assert (cache.num_free_blocks, cache.num_cached_blocks) == (2, 0)
    assert cache.reserve("a", ROWS) is not None


def test_only_as_much_is_evicted_as_is_needed_and_the_longest_unused_first() -> None:
    cache = a_cache(4)
    for mm_hash in "abc":
        encoded(cache, mm_hash, 1)
    cache.get("a")
    encoded(cache, "d", 2)
    assert cache.num_evictions == 1
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


def test_what_is_leased_or_pending_is_not_evicted() -> None:
    cache = a_cache(3)
    encoded(cache, "a", 1)
    lease_id = cache.lease("a", 10.0)
    encoded(cache, "b", 1)
    assert cache.reserve("c", ROWS) is not None
    assert cache.num_free_blocks == 1
    assert cache.reserve("d", 2 * ROWS) is None
    assert cache.get("b") is not None  # nothing was evicted in vain
    cache.release(lease_id)
    assert cache.reserve("d", 2 * ROWS) is not None
    assert cache.get("a") is None
    assert cache.get("b") is None


def test_every_handle_has_its_own_lease() -> None:
    cache = a_cache(2)
    embedding = encoded(cache, "a", 2)
    first, second = cache.lease("a", 8.0), cache.lease("a", 6.0)
    assert cache.num_leases == 2
    assert cache.owns(first, embedding.block_ids)
    assert cache.expire(7.0) == [second]
    assert not cache.owns(second, embedding.block_ids)
    assert cache.reserve("b", ROWS) is None
    assert cache.release(first)
    assert not cache.release(first)
    assert cache.is_idle()
    assert cache.reserve("b", ROWS) is not None


def test_a_corrupt_embedding_goes_with_its_last_lease() -> None:
    cache = a_cache(4)
    encoded(cache, "a", 2)
    encoded(cache, "b", 1)
    first, second, other = cache.lease("a", 8.0), cache.lease("a", 8.0), cache.lease("b", 8.0)
    assert cache.release(first, is_corrupt=True)
    assert cache.get("a") is not None  # somebody may be reading it, and will find out
    assert cache.release(second, is_corrupt=True)
    assert cache.get("a") is None
    assert cache.release(other)
    assert cache.get("b") is not None
    assert not cache.release(second, is_corrupt=True)
    cache.check_integrity()


def test_for_an_image_larger_than_the_pool_nothing_is_evicted() -> None:
    cache = a_cache(2)
    encoded(cache, "a", 1)
    assert cache.num_blocks_of(2 * ROWS + 1) == 3 > cache.num_blocks
    assert cache.reserve("b", 2 * ROWS + 1) is None
    assert cache.get("a") is not None


@pytest.mark.parametrize(
    "misuse",
    [
        lambda cache: cache.reserve("ready", 1),
        lambda cache: cache.reserve("pending", 1),
        lambda cache: cache.fill("ready", [0]),
        lambda cache: cache.fill("pending", [0, 0]),
        lambda cache: cache.fill("unknown", []),
        lambda cache: cache.fail("ready"),
        lambda cache: cache.fail("unknown"),
        lambda cache: cache.lease("pending", 1.0),
        lambda cache: cache.lease("unknown", 1.0),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse: Callable[[EncoderCache], object]) -> None:
    cache = a_cache(3)
    encoded(cache, "ready", 1)
    cache.reserve("pending", 1)
    with pytest.raises(InternalError):
        misuse(cache)
    cache.check_integrity()
    assert len(cache.pending_blocks("pending")) == 1
    assert cache.get("ready") is not None
    assert (cache.num_free_blocks, cache.num_leases) == (2, 0)


def _lose_an_entry(cache: EncoderCache) -> None:
    cache._ready.pop("b")


def _miscount(cache: EncoderCache) -> None:
    cache._num_unleased_blocks += 1


def _forget_a_lease(cache: EncoderCache) -> None:
    cache._leases.clear()


def _evict_a_leased_one(cache: EncoderCache) -> None:
    cache._unleased["a"] = None


def _take_from_under_it(cache: EncoderCache) -> None:
    cache._pool.allocate(1)


@pytest.mark.parametrize("damage", [_lose_an_entry, _miscount, _forget_a_lease, _evict_a_leased_one, _take_from_under_it])
def test_damage_is_found(damage: Callable[[EncoderCache], None]) -> None:
    cache = a_cache(4)
    encoded(cache, "a", 1)
    cache.lease("a", 1.0)
    encoded(cache, "b", 1)
    cache.check_integrity()
    damage(cache)
    with pytest.raises(InternalError):
        cache.check_integrity()


class EncoderCacheMachine(RuleBasedStateMachine):
    """The twin keeps sizes by image, leases, and the order of use."""

    names = st.sampled_from("abcdef")

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = a_cache(num_blocks)
        self.pending: dict[str, int] = {}
        self.ready: dict[str, int] = {}
        self.leases: dict[int, tuple[str, float]] = {}
        self.used: list[str] = []  # ready images, longest unused first; a lease's end is a use
        self.now = 0.0

    def leased(self) -> set[str]:
        return {mm_hash for mm_hash, _ in self.leases.values()}

    def touch(self, mm_hash: str) -> None:
        self.used = [name for name in self.used if name != mm_hash] + [mm_hash]

    @rule(mm_hash=names)
    def get(self, mm_hash: str) -> None:
        assert (self.cache.get(mm_hash) is not None) == (mm_hash in self.ready)
        if mm_hash in self.ready:
            self.touch(mm_hash)

    @rule(mm_hash=names, size=st.integers(1, 4))
    def reserve(self, mm_hash: str, size: int) -> None:
        if mm_hash in self.pending or mm_hash in self.ready:
            with pytest.raises(InternalError):
                self.cache.reserve(mm_hash, size * ROWS)
            return
        evictable = [name for name in self.used if name not in self.leased()]
        num_empty = self.num_blocks - sum(self.pending.values()) - sum(self.ready.values())
        taken = self.cache.reserve(mm_hash, size * ROWS)
        assert (taken is not None) == (size <= num_empty + sum(self.ready[name] for name in evictable))
        if taken is None:
            return
        while num_empty < size:
            evicted = evictable.pop(0)
            num_empty += self.ready.pop(evicted)
            self.used.remove(evicted)
        self.pending[mm_hash] = size

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), works=st.booleans())
    def settle(self, data: st.DataObject, works: bool) -> None:
        mm_hash = data.draw(st.sampled_from(sorted(self.pending)))
        size = self.pending.pop(mm_hash)
        if works:
            self.cache.fill(mm_hash, range(size))
            self.ready[mm_hash] = size
            self.touch(mm_hash)
        else:
            self.cache.fail(mm_hash)

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), lasts=st.integers(0, 4))
    def lease(self, data: st.DataObject, lasts: int) -> None:
        mm_hash = data.draw(st.sampled_from(sorted(self.ready)))
        self.leases[self.cache.lease(mm_hash, self.now + lasts)] = (mm_hash, self.now + lasts)

    def ended(self, lease_id: int) -> None:
        mm_hash, _ = self.leases.pop(lease_id)
        if mm_hash not in self.leased():
            self.touch(mm_hash)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.cache.release(lease_id)
        self.ended(lease_id)

    @rule(passed=st.integers(0, 3))
    def expire(self, passed: int) -> None:
        self.now += passed
        expired = self.cache.expire(self.now)
        assert set(expired) == {lease_id for lease_id, (_, at) in self.leases.items() if at <= self.now}
        for lease_id in expired:
            self.ended(lease_id)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.num_leases == len(self.leases)
        assert all(len(self.cache.pending_blocks(mm_hash)) == size for mm_hash, size in self.pending.items())
        assert self.cache.num_cached_blocks == sum(self.ready.values())
        held = sum(self.pending.values()) + sum(self.ready[mm_hash] for mm_hash in self.leased())
        assert self.cache.num_free_blocks == self.num_blocks - held
        assert self.cache.is_idle() == (not self.pending and not self.leases)


TestEncoderCacheMachine = EncoderCacheMachine.TestCase
TestEncoderCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
