"""Which images go into which step: limits, merging, and nobody held up for long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.encode.batcher import EncodeBatcher
from epd.errors import BadConfig, InternalError
from protocol.messages import MMItem, RequestId

FOR_EVER = 1e9


def an_image(mm_hash: str, num_patches: int, offset: int = 0) -> MMItem:
    return MMItem(mm_hash, offset, max(1, num_patches // 4), 1, 1, num_patches)


def add(
    batcher: EncodeBatcher, mm_hash: str, num_patches: int, *, request: str = "r", epoch: int = 1, deadline: float = FOR_EVER
) -> None:
    batcher.add(RequestId(request), epoch, an_image(mm_hash, num_patches), deadline)


def take(batcher: EncodeBatcher, reserve: Callable[[MMItem], bool] | None = None) -> list[str]:
    """The next batch, encoded at once."""
    batch = batcher.next_batch(reserve)
    batcher.check_integrity()
    for job in batch:
        batcher.finish(job.mm_hash)
    return [job.mm_hash for job in batch]


def test_a_batch_holds_images_up_to_both_limits() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=3)
    for name, num_patches in [("a", 40), ("b", 40), ("c", 40), ("d", 10), ("e", 10), ("f", 10)]:
        add(batcher, name, num_patches)
    assert batcher.outstanding_patches == 150
    assert take(batcher) == ["d", "e", "f"]
    assert take(batcher) == ["a", "b"]
    assert take(batcher) == ["c"]
    assert take(batcher) == []
    assert batcher.is_idle()


def test_an_image_over_the_limit_goes_alone() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "huge", 1000)
    add(batcher, "small", 10)
    assert take(batcher) == ["small"]
    assert take(batcher) == ["huge"]


def test_a_huge_image_is_passed_by_no_more_than_its_own_size() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "huge", 400)
    batches = []
    for number in range(20):
        for place in range(4):
            add(batcher, f"{number}.{place}", 25)
        batches.append(take(batcher))
        if batches[-1] == ["huge"]:
            break
    assert len(batches) == 5  # four batches of a hundred patches went first


def test_what_is_due_goes_in_order_of_arrival() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "larger", 90)
    add(batcher, "large", 80)
    add(batcher, "small", 95)
    for number in range(2):
        for place in range(5):
            add(batcher, f"{number}.{place}", 10)
        take(batcher)
    assert [take(batcher) for _ in range(3)] == [["larger"], ["large"], ["small"]]


def test_asks_for_one_image_are_answered_together() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10, request="r1")
    add(batcher, "a", 10, request="r2")
    batcher.add(RequestId("r2"), 1, an_image("a", 10, offset=50), FOR_EVER)
    assert (batcher.num_waiting, batcher.outstanding_patches) == (1, 10)
    assert [job.mm_hash for job in batcher.next_batch()] == ["a"]
    add(batcher, "a", 10, request="late")
    assert batcher.next_batch() == ()
    assert (batcher.num_waiting, batcher.num_in_flight) == (0, 1)
    waiters = batcher.finish("a")
    assert [(waiter.request_id, waiter.item.offset) for waiter in waiters] == [("r1", 0), ("r2", 0), ("r2", 50), ("late", 0)]
    assert batcher.is_idle()


def test_a_queued_image_that_nobody_wants_any_more_is_not_encoded() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10, request="r1")
    add(batcher, "a", 10, request="r2")
    add(batcher, "b", 10, request="r2", epoch=2)
    assert [waiter.item.mm_hash for waiter in batcher.abort(RequestId("r2"), epoch=1)] == ["a"]
    assert [waiter.item.mm_hash for waiter in batcher.abort(RequestId("r2"))] == ["b"]
    assert batcher.abort(RequestId("r2")) == ()
    assert take(batcher) == ["a"]


def test_an_image_in_flight_is_encoded_to_the_end() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10)
    batcher.next_batch()
    assert len(batcher.abort(RequestId("r"))) == 1
    assert not batcher.is_idle()
    assert batcher.finish("a") == ()
    assert batcher.is_idle()


def test_overdue_asks_are_dropped_and_told() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10, request="soon", deadline=5.0)
    add(batcher, "a", 10, request="later", deadline=6.0)
    add(batcher, "b", 10, request="soon", deadline=5.0)
    assert batcher.expire(4.9) == ()
    assert [(waiter.request_id, waiter.item.mm_hash) for waiter in batcher.expire(5.0)] == [("soon", "a"), ("soon", "b")]
    assert take(batcher) == ["a"]


def test_an_image_without_room_keeps_its_place() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 50)
    add(batcher, "b", 10)
    assert take(batcher, lambda item: item.mm_hash != "b") == ["a"]
    assert take(batcher, lambda item: False) == []
    assert take(batcher) == ["b"]


def test_smaller_images_do_not_take_all_room_for_ever() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "large", 60)
    num_passed = 0
    for number in range(20):
        add(batcher, f"small{number}", 20)
        if not take(batcher, lambda item: item.mm_hash != "large"):
            break
        num_passed += 1
    assert num_passed == 3
    assert take(batcher)[0] == "large"


def test_only_what_is_in_flight_can_finish() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10)
    for mm_hash in ("a", "unknown"):
        with pytest.raises(InternalError, match="is not being encoded"):
            batcher.finish(mm_hash)


@pytest.mark.parametrize(("max_patches", "max_images"), [(0, 1), (1, 0)])
def test_limits_that_cannot_work_are_refused(max_patches: int, max_images: int) -> None:
    with pytest.raises(BadConfig):
        EncodeBatcher(max_patches=max_patches, max_images=max_images)


def test_damage_is_found() -> None:
    batcher = EncodeBatcher(max_patches=100, max_images=8)
    add(batcher, "a", 10)
    batcher._jobs["a"].waiters.clear()
    with pytest.raises(InternalError, match="nobody waits"):
        batcher.check_integrity()
    batcher._jobs["b"] = batcher._jobs.pop("a")
    with pytest.raises(InternalError, match="another hash"):
        batcher.check_integrity()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 20), st.integers(80, 400)), min_size=1, max_size=40),
    burst=st.integers(1, 5),
    max_images=st.integers(1, 6),
)
def test_nobody_is_passed_by_much_more_than_its_own_size(sizes: list[int], burst: int, max_images: int) -> None:
    """Images arrive `burst` to a step. What passes one adds up to less than its own size, a batch, and what came before it."""
    batcher = EncodeBatcher(max_patches=100, max_images=max_images)
    arrived: dict[str, int] = {}
    done: set[str] = set()
    passed: dict[str, int] = {}
    todo = list(enumerate(sizes))
    while len(done) < len(sizes):
        for number, size in todo[:burst]:
            arrived[f"i{number}"] = size
            passed[f"i{number}"] = 0
            add(batcher, f"i{number}", size)
        todo = todo[burst:]
        batch = take(batcher)
        assert batch, "a step was left empty while images wait"
        assert len(batch) <= max_images
        assert len(batch) == 1 or sum(arrived[name] for name in batch) <= 100
        done |= set(batch)
        names = list(arrived)
        for name in names:
            if name not in done:
                passed[name] += sum(arrived[other] for other in batch if names.index(other) > names.index(name))
                earlier = sum(arrived[other] for other in names[: names.index(name)])
                assert passed[name] < arrived[name] + max(100, max(arrived.values())) + earlier


class BatcherMachine(RuleBasedStateMachine):
    """Every ask is answered, aborted or overdue exactly once."""

    @initialize()
    def start(self) -> None:
        self.batcher = EncodeBatcher(max_patches=50, max_images=3)
        self.asks: set[tuple[str, int, str, int]] = set()  # request, epoch, image, offset
        self.deadlines: dict[tuple[str, int, str, int], float] = {}
        self.in_flight: list[str] = []
        self.now = 0.0
        self.num_asks = 0

    @rule(image=st.sampled_from("abcde"), request=st.sampled_from("rst"), epoch=st.integers(1, 2), lasts=st.integers(1, 9))
    def ask(self, image: str, request: str, epoch: int, lasts: int) -> None:
        self.num_asks += 1
        key = (request, epoch, image, self.num_asks)
        self.asks.add(key)
        self.deadlines[key] = self.now + lasts
        item = an_image(image, 10 * (ord(image) - 96), offset=self.num_asks)
        self.batcher.add(RequestId(request), epoch, item, self.now + lasts)

    @rule(room=st.sets(st.sampled_from("abcde")))
    def plan(self, room: set[str]) -> None:
        batch = self.batcher.next_batch(lambda item: item.mm_hash in room)
        assert {job.mm_hash for job in batch} <= room - set(self.in_flight)
        assert all(job.waiters for job in batch)
        self.in_flight += [job.mm_hash for job in batch]

    @precondition(lambda self: self.in_flight)
    @rule()
    def finish(self) -> None:
        image = self.in_flight.pop(0)
        answered = {(w.request_id, w.epoch, w.item.mm_hash, w.item.offset) for w in self.batcher.finish(image)}
        assert answered == {key for key in self.asks if key[2] == image}
        self.asks -= answered

    @rule(request=st.sampled_from("rst"), epoch=st.integers(1, 2))
    def abort(self, request: str, epoch: int) -> None:
        gone = {(w.request_id, w.epoch, w.item.mm_hash, w.item.offset) for w in self.batcher.abort(RequestId(request), epoch)}
        assert gone == {key for key in self.asks if key[0] == request and key[1] <= epoch}
        self.asks -= gone

    @rule(passed=st.integers(0, 3))
    def expire(self, passed: int) -> None:
        self.now += passed
        gone = {(w.request_id, w.epoch, w.item.mm_hash, w.item.offset) for w in self.batcher.expire(self.now)}
        assert gone == {key for key in self.asks if self.deadlines[key] <= self.now}
        self.asks -= gone

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "batcher"):
            return
        self.batcher.check_integrity()
        wanted = {key[2] for key in self.asks}
        assert self.batcher.num_in_flight == len(self.in_flight)
        assert self.batcher.num_waiting == len(wanted - set(self.in_flight))
        assert self.batcher.is_idle() == (not wanted and not self.in_flight)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
