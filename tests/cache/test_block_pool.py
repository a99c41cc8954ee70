"""The block pool against tables and against a slow, obvious twin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.cache.block_pool import BlockPool, CachedPrefix
from epd.errors import InternalError


def filled(pool: BlockPool, *hashes: int) -> list[int]:
    """Held blocks published under these hashes."""
    block_ids = pool.allocate(len(hashes))
    assert block_ids is not None
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        assert pool.cache(block_id, block_hash)
    return block_ids


def test_a_pool_gives_each_block_once() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(3), pool.allocate(2)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.free(first)
    assert pool.num_free == 3
    pool.check_integrity([second])


def test_only_cached_content_that_gives_way_to_other_content_was_evicted() -> None:
    pool = BlockPool(3)
    pool.free(filled(pool, 1, 2))
    assert pool.allocate(1) == [2]
    assert pool.num_evictions == 0
    assert pool.allocate(1) == [1]
    assert pool.num_evictions == 1


def test_asking_for_too_much_takes_nothing() -> None:
    pool = BlockPool(3)
    filled(pool, 7)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert pool.num_cached == 1


def test_a_block_is_free_when_the_last_reference_goes() -> None:
    pool = BlockPool(2)
    table = pool.allocate(2)
    assert table is not None
    pool.take(table[:1])
    pool.free(table)
    assert pool.num_free == 1
    assert not pool.is_idle()
    pool.free(table[:1])
    assert pool.is_idle()


def test_published_blocks_are_found_as_the_longest_prefix() -> None:
    pool = BlockPool(6)
    table = filled(pool, 10, 20, 30)
    pool.free(table)
    assert pool.num_free == 6
    assert pool.peek([10, 20, 99]) == CachedPrefix(num_blocks=2, num_evictable=2)
    assert pool.lookup([10, 20, 99, 30]) == table[:2]
    assert pool.peek([10, 20, 30]) == CachedPrefix(num_blocks=3, num_evictable=1)
    assert pool.lookup([99, 10]) == []
    assert pool.num_free == 4
    assert (pool.cache_hits, pool.cache_queries) == (2, 6)
    pool.check_integrity([table[:2]])


def test_two_holders_share_a_cached_block() -> None:
    pool = BlockPool(1)
    table = filled(pool, 10)
    assert pool.lookup([10]) == table
    pool.free(table)
    assert pool.allocate(1) is None
    pool.free(table)
    assert pool.allocate(1) == table
    assert pool.lookup([10]) == []


def test_empty_blocks_go_before_cached_ones_and_the_oldest_chain_end_first() -> None:
    pool = BlockPool(6)
    old, new = filled(pool, 1, 2), filled(pool, 3, 4)
    pool.free(old)
    pool.free(new)
    pool.allocate(2)
    assert pool.num_cached == 4
    pool.allocate(1)
    assert pool.peek([1, 2]).num_blocks == 1  # the end of the older chain went
    pool.allocate(1)
    assert pool.peek([1]).num_blocks == 0
    assert pool.peek([3, 4]).num_blocks == 2


def test_a_lookup_makes_content_young_again() -> None:
    pool = BlockPool(2)
    pool.free(filled(pool, 1))
    pool.free(filled(pool, 2))
    pool.free(pool.lookup([1]))
    pool.allocate(1)
    assert pool.peek([1]).num_blocks == 1
    assert pool.peek([2]).num_blocks == 0


def test_the_first_block_with_a_content_is_the_one_that_is_found() -> None:
    pool = BlockPool(2)
    first = filled(pool, 1)
    second = pool.allocate(1)
    assert second is not None
    assert not pool.cache(second[0], 1)
    assert pool.cache(first[0], 1)
    pool.free(second)
    assert pool.num_free == 1
    assert pool.lookup([1]) == first
    pool.check_integrity([first, first])


# --- leases -------------------------------------------------------------------------------------------------------------


def test_a_lease_outlives_its_giver_until_released() -> None:
    pool = BlockPool(2)
    table = pool.allocate(2)
    assert table is not None
    lease_id = pool.lease(table, expires_at=10.0)
    pool.free(table)
    assert pool.num_free == 0
    assert pool.num_leases == 1
    assert not pool.is_idle()
    assert pool.release(lease_id)
    assert not pool.release(lease_id)
    assert pool.is_idle()


def test_leases_expire_when_their_time_has_come() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    assert table is not None
    long, short, released = (pool.lease([block_id], at) for block_id, at in zip(table, (9.0, 5.0, 5.0), strict=True))
    pool.free(table)
    assert pool.release(released)
    assert pool.expire(4.9) == []
    assert pool.expire(5.0) == [short]
    assert pool.num_free == 2
    assert not pool.release(short)
    assert pool.expire(8.9) == []
    assert pool.expire(100.0) == [long]
    assert pool.is_idle()


def test_leases_that_were_released_early_do_not_pile_up() -> None:
    pool = BlockPool(1)
    table = pool.allocate(1)
    assert table is not None
    lasting = pool.lease(table, 7_000.5)
    for now in range(10_000):
        assert pool.release(pool.lease(table, now + 600.0))
    assert len(pool._leases._due) < 200
    assert pool.expire(7_000.0) == []
    assert pool.expire(20_000.0) == [lasting]


def test_a_lease_owns_its_own_blocks_only() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    assert table is not None
    lease_id = pool.lease(table[:2], 1.0)
    assert pool.owns(lease_id, table[:2])
    assert pool.owns(lease_id, table[1:2])
    assert not pool.owns(lease_id, table)
    assert not pool.owns(lease_id + 1, table[:1])
    pool.release(lease_id)
    assert not pool.owns(lease_id, table[:1])


# --- misuse and damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.free([3]),
        lambda pool: pool.free([0, 0]),
        lambda pool: pool.free([0, -1]),
        lambda pool: pool.free([0, 4]),
        lambda pool: pool.take([0, 3]),
        lambda pool: pool.cache(3, 5),
        lambda pool: pool.cache(0, 5),
        lambda pool: pool.lease([0, 3], 1.0),
        lambda pool: pool.allocate(-1),
        lambda pool: BlockPool(0),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(4)
    held = filled(pool, 1)
    with pytest.raises(InternalError):
        misuse(pool)
    pool.check_integrity([held])
    assert (pool.num_free, pool.num_leases, pool.num_cached) == (3, 0, 1)


def _lose_a_block(pool: BlockPool) -> None:
    pool._free.pop()


def _free_twice(pool: BlockPool) -> None:
    pool._free.append(pool._free[0])


def _forget_a_reference(pool: BlockPool) -> None:
    pool._refs[0] -= 1


def _misfile_a_hash(pool: BlockPool) -> None:
    pool._cached[77] = pool._cached.pop(1)


def _forget_a_lease(pool: BlockPool) -> None:
    pool._leases.pop(1)


@pytest.mark.parametrize("damage", [_lose_a_block, _free_twice, _forget_a_reference, _misfile_a_hash, _forget_a_lease])
def test_damage_is_found(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(5)
    held = filled(pool, 1)
    pool.free(filled(pool, 2))
    pool.lease(held, 1.0)
    pool.check_integrity([held])
    damage(pool)
    with pytest.raises(InternalError):
        pool.check_integrity([held])


def test_a_table_that_nobody_counted_is_found() -> None:
    pool = BlockPool(2)
    held = filled(pool, 1)
    pool.check_integrity()
    with pytest.raises(InternalError, match="block 0 has 1 references, its holders 0"):
        pool.check_integrity([])
    with pytest.raises(InternalError, match="its holders 2"):
        pool.check_integrity([held, held])


# --- against a twin -----------------------------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """The twin keeps who holds what, what was written into each block, and the order in which content became unused."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[list[int]] = []
        self.leases: dict[int, tuple[list[int], float]] = {}
        self.content: dict[int, int] = {}  # block -> hash that was published for it
        self.unused: list[int] = []  # published blocks that nobody holds, longest unused first
        self.now = 0.0

    def refs(self) -> Counter[int]:
        return Counter(block_id for table in [*self.held, *(ids for ids, _ in self.leases.values())] for block_id in table)

    def note_freed(self, block_ids: Sequence[int]) -> None:
        refs = self.refs()
        self.unused += [block_id for block_id in reversed(block_ids) if not refs[block_id] and block_id in self.content]

    @rule(num_blocks=st.integers(0, 9))
    def allocate(self, num_blocks: int) -> None:
        num_free = self.pool.num_blocks - len(self.refs())
        taken = self.pool.allocate(num_blocks)
        assert (taken is None) == (num_blocks > num_free)
        if taken is None:
            return
        assert not set(taken) & self.refs().keys()
        num_evicted = max(0, num_blocks - (num_free - len(self.unused)))
        for block_id in self.unused[:num_evicted]:
            assert block_id in taken
            del self.content[block_id]
        del self.unused[:num_evicted]
        assert not set(taken) & self.content.keys()
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(table)
        self.note_freed(table)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.held))
        self.pool.take(table)
        self.held.append(list(table))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), block_hash=st.integers(0, 5))
    def publish(self, data: st.DataObject, block_hash: int) -> None:
        block_id = data.draw(st.sampled_from(sorted({block_id for table in self.held for block_id in table})))
        if self.content.get(block_id, block_hash) != block_hash:
            with pytest.raises(InternalError):
                self.pool.cache(block_id, block_hash)
            return
        is_first = block_hash not in self.content.values() or self.content.get(block_id) == block_hash
        assert self.pool.cache(block_id, block_hash) == is_first
        if is_first:
            self.content[block_id] = block_hash

    @rule(hashes=st.lists(st.integers(0, 5), max_size=4, unique=True))
    def lookup(self, hashes: list[int]) -> None:
        block_of = {block_hash: block_id for block_id, block_hash in self.content.items()}
        due: list[int] = []
        for block_hash in hashes:
            if block_hash not in block_of:
                break
            due.append(block_of[block_hash])
        assert self.pool.peek(hashes) == CachedPrefix(len(due), sum(block_id in self.unused for block_id in due))
        assert self.pool.lookup(hashes) == due
        self.unused = [block_id for block_id in self.unused if block_id not in due]
        self.held.append(due)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), lasts=st.integers(0, 5))
    def lease(self, data: st.DataObject, lasts: int) -> None:
        table = data.draw(st.sampled_from(self.held))
        lease_id = self.pool.lease(table, self.now + lasts)
        assert lease_id not in self.leases
        self.leases[lease_id] = (list(table), self.now + lasts)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        table, _ = self.leases.pop(lease_id)
        assert self.pool.release(lease_id)
        assert not self.pool.release(lease_id)
        self.note_freed(table)

    @rule(passed=st.integers(0, 4))
    def expire(self, passed: int) -> None:
        self.now += passed
        due = {lease_id for lease_id, (_, expires_at) in self.leases.items() if expires_at <= self.now}
        expired = self.pool.expire(self.now)
        assert set(expired) == due
        for lease_id in expired:
            table, _ = self.leases.pop(lease_id)
            self.note_freed(table)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.held)
        refs = self.refs()
        assert self.pool.num_free == self.pool.num_blocks - len(refs)
        assert self.pool.num_cached == len(self.content)
        assert self.pool.num_leases == len(self.leases)
        assert self.pool.is_idle() == (not refs and not self.leases)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_after_corruption_nothing_that_was_published_is_found() -> None:
    """What others hold they keep, and may be published anew."""
    pool = BlockPool(6)
    spoilt, other, idle = pool.allocate(2), pool.allocate(1), pool.allocate(1)
    assert spoilt is not None
    assert other is not None
    assert idle is not None
    for block_id, block_hash in zip([*spoilt, *other, *idle], (1, 2, 3, 4), strict=True):
        assert pool.cache(block_id, block_hash)
    pool.free(idle)
    lease_id = pool.lease(spoilt, 10.0)
    pool.free(spoilt)
    assert pool.release(lease_id, is_corrupt=True)
    assert [pool.lookup([block_hash]) for block_hash in (1, 2, 3, 4)] == [[]] * 4
    pool.check_integrity([other])
    assert pool.num_free == 5
    assert pool.cache(other[0], 3)
    assert pool.lookup([3]) == other
    assert not pool.release(lease_id, is_corrupt=True)
    assert pool.lookup([3]) == other
