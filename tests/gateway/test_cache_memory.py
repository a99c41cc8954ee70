"""The gateway's memory of other workers' caches."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from epd.gateway.cache_memory import CacheMemory
from protocol.messages import WorkerId

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def test_each_workers_longest_prefix_is_found() -> None:
    memory = CacheMemory(100)
    memory.remember([1, 2, 3, 4], A)
    memory.remember([1, 2], B)
    memory.remember([2, 3], C)
    assert memory.longest([1, 2, 3, 5]) == {A: 3, B: 2}
    assert memory.longest([2, 3]) == {A: 2, B: 1, C: 2}
    assert memory.longest([9]) == {}
    assert memory.longest([]) == {}


def test_the_ends_of_the_oldest_chains_are_forgotten_first() -> None:
    memory = CacheMemory(4)
    memory.remember([1, 2], A)
    memory.remember([3, 4], A)
    memory.remember([1, 2], A)
    memory.remember([5], A)
    assert memory.longest([3, 4]) == {A: 1}
    assert memory.longest([1, 2]) == {A: 2}
    assert len(memory) == 4


def test_a_chain_longer_than_the_memory_keeps_its_beginning() -> None:
    memory = CacheMemory(3)
    memory.remember([1, 2, 3, 4, 5], A)
    assert memory.longest([1, 2, 3, 4, 5]) == {A: 3}


def test_a_worker_can_be_forgotten() -> None:
    memory = CacheMemory(9)
    memory.remember([1, 2], A)
    memory.remember([1, 2], B)
    memory.drop([2], B)
    assert memory.longest([1, 2]) == {A: 2, B: 1}
    memory.forget(A)
    assert memory.longest([1, 2]) == {B: 1}
    memory.forget(B)
    assert len(memory) == 0


class MemoryMachine(RuleBasedStateMachine):
    """The twin keeps (key, worker) pairs and the order of the keys."""

    chains = st.lists(st.integers(0, 7), max_size=5, unique=True)
    workers = st.sampled_from([A, B, C])

    @initialize(max_keys=st.integers(1, 8))
    def start(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.memory = CacheMemory(max_keys)
        self.pairs: set[tuple[int, WorkerId]] = set()
        self.keys: list[int] = []

    @rule(chain=chains, worker=workers)
    def remember(self, chain: list[int], worker: WorkerId) -> None:
        self.memory.remember(chain, worker)
        self.pairs |= {(key, worker) for key in chain}
        self.keys = [key for key in self.keys if key not in chain] + chain[::-1]
        self.keys = self.keys[-self.max_keys :]
        self.pairs = {(key, holder) for key, holder in self.pairs if key in self.keys}

    @rule(chain=chains, worker=workers)
    def drop(self, chain: list[int], worker: WorkerId) -> None:
        self.memory.drop(chain, worker)
        self.pairs -= {(key, worker) for key in chain}

    @rule(worker=workers)
    def forget(self, worker: WorkerId) -> None:
        self.memory.forget(worker)
        self.pairs = {(key, holder) for key, holder in self.pairs if holder != worker}

    @rule(chain=chains)
    def longest(self, chain: list[int]) -> None:
        due: dict[WorkerId, int] = {}
        for worker in (A, B, C):
            for key in chain:
                if (key, worker) not in self.pairs:
                    break
                due[worker] = due.get(worker, 0) + 1
        assert self.memory.longest(chain) == due

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "memory"):
            self.keys = [key for key in self.keys if any(held == key for held, _ in self.pairs)]
            assert len(self.memory) == len(self.keys)


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
