"""Which worker is chosen, and that outstanding work is counted exactly."""

from __future__ import annotations

from collections import Counter
from itertools import product

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.errors import InternalError, Unavailable
from epd.gateway.placement import Assignment, Placement, WorkerView
from protocol.messages import MMItem, StageLoad, WorkerId

BLOCK = 16


def an_image(mm_hash: str, num_tokens: int = 64) -> MMItem:
    return MMItem(mm_hash, 0, num_tokens, 1, 2, 2 * num_tokens)


def a_prompt(worker: str) -> Assignment:
    """Placed there, and done."""
    return Assignment("prefill", WorkerId(worker), 100, 0, ())


def view(
    name: str,
    *roles: str,
    tokens: int = 0,
    running: int = 0,
    free: int = 100,
    is_alive: bool = True,
    is_draining: bool = False,
) -> WorkerView:
    stages = (
        StageLoad(
            role,
            num_running=running,
            outstanding_tokens=0 if role == "decode" else tokens,
            num_blocks=100,
            num_free_blocks=free,
        )
        for role in roles
    )
    return WorkerView(WorkerId(name), tuple(stages), is_alive, is_draining)


def a_placement(*views: WorkerView) -> Placement:
    placement = Placement(block_size=BLOCK)
    placement.update(views)
    return placement


def test_together_a_request_stays_on_one_worker_and_requests_spread_by_number() -> None:
    placement = Placement(block_size=BLOCK, together=True)
    placement.update([view(name, "encode", "prefill", "decode", running=7 * (name == "w2")) for name in ("w1", "w2")])
    first = placement.place_prefill([], 900)
    assert placement.place_decode([], 900, prompt=first).worker == first.worker
    assert {placement.place_encode(an_image(f"i{n}"), of=(first,)).worker for n in range(3)} == {first.worker}
    second = placement.place_prefill([], 10)
    assert second.worker != first.worker
    assert placement.place_decode([], 10, prompt=second).worker == second.worker
    # an image that is cached on the other worker is encoded again
    assert placement.place_encode(an_image("i0"), of=(second,)).worker == second.worker


def test_together_goes_elsewhere_for_a_stage_that_the_worker_does_not_have() -> None:
    placement = Placement(block_size=BLOCK, together=True)
    placement.update([view("p", "prefill"), view("d", "decode"), view("e", "encode")])
    assert placement.place_decode([], 10, prompt=a_prompt("p")).worker == "d"
    assert placement.place_encode(an_image("i"), of=(a_prompt("p"),)).worker == "e"


# --- encode -------------------------------------------------------------------------------------------------------------


def test_images_of_one_request_spread_over_equal_encoders() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode"), view("e3", "encode"))
    placed = Counter(placement.place_encode(an_image(f"i{number}")).worker for number in range(9))
    assert placed == {"e1": 3, "e2": 3, "e3": 3}


def test_an_image_goes_where_the_fewest_tokens_are_outstanding() -> None:
    placement = a_placement(view("e1", "encode", tokens=100), view("e2", "encode"))
    assert placement.place_encode(an_image("large", 400)).worker == "e2"
    assert placement.place_encode(an_image("a", 200)).worker == "e1"
    assert placement.place_encode(an_image("b", 200)).worker == "e1"
    assert placement.place_encode(an_image("c", 200)).worker == "e2"


def test_an_image_goes_back_to_where_it_is_cached_at_no_cost() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode"))
    first = placement.place_encode(an_image("a"))
    other = placement.place_encode(an_image("b", 6400))
    assert first.worker != other.worker
    again = placement.place_encode(an_image("b", 6400))
    assert (again.worker, again.amount, again.num_cached_tokens) == (other.worker, 0, 6400)
    assert (first.amount, first.num_cached_tokens) == (64, 0)


def test_what_failed_is_not_expected_to_be_cached() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode"))
    failed = placement.place_encode(an_image("a"))
    placement.end(failed, failed=True)
    assert placement.place_encode(an_image("a")).num_cached_tokens == 0


def test_a_worker_that_failed_this_work_is_the_last_choice() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode", tokens=9999))
    assert placement.place_encode(an_image("a"), avoid=[WorkerId("e1")]).worker == "e2"
    assert placement.place_encode(an_image("b"), avoid=[WorkerId("e1"), WorkerId("e2")]).worker == "e1"


# --- prefill ------------------------------------------------------------------------------------------------------------


def test_a_prompt_goes_where_the_fewest_tokens_are_outstanding() -> None:
    placement = a_placement(view("p1", "prefill", tokens=500), view("p2", "prefill", tokens=400))
    assert [placement.place_prefill((), 200).worker for _ in range(3)] == ["p2", "p1", "p2"]


def test_a_cached_prefix_is_worth_as_many_outstanding_tokens() -> None:
    placement = a_placement(view("p1", "prefill"), view("p2", "prefill"))
    hashes = tuple(range(10))
    first = placement.place_prefill(hashes, 165)
    assert (first.amount, first.num_cached_tokens) == (165, 0)
    placement.end(first)
    again = placement.place_prefill((*hashes, 77), 180)
    assert (again.worker, again.amount, again.num_cached_tokens) == (first.worker, 20, 160)
    placement.end(again)
    other = placement.place_prefill((), 159)
    assert other.worker != first.worker  # turns are taken
    placement.place_prefill((), 320)
    assert placement.place_prefill(hashes, 170).worker == other.worker  # 320 tokens outweigh 160 cached and 159 waiting


def test_the_last_token_is_never_cached() -> None:
    placement = a_placement(view("p1", "prefill"))
    placement.place_prefill((1, 2), 32)
    assert placement.place_prefill((1, 2), 32).amount == 1


# --- decode -------------------------------------------------------------------------------------------------------------


def test_requests_spread_over_equal_decoders() -> None:
    placement = a_placement(view("d1", "decode"), view("d2", "decode"))
    assert Counter(placement.place_decode((), 100).worker for _ in range(8)) == {"d1": 4, "d2": 4}


@pytest.mark.parametrize(
    ("one", "other", "chosen"),
    [
        (view("d1", "decode", running=3), view("d2", "decode", running=2), "d2"),
        (view("d1", "decode", running=2, free=20), view("d2", "decode", running=2, free=60), "d2"),
        (view("d1", "decode", running=0, free=3), view("d2", "decode", running=9, free=60), "d2"),  # no room
        (view("d1", "decode", running=0, free=3), view("d2", "decode", running=9, free=3), "d1"),
        (WorkerView(WorkerId("d1"), (StageLoad("decode"),)), view("d2", "decode", running=1), "d1"),  # no report yet
        (view("d2", "decode"), view("d1", "decode"), "d2"),  # near
    ],
)
def test_decode_goes_where_a_step_is_shortest(one: WorkerView, other: WorkerView, chosen: str) -> None:
    placement = a_placement(one, other)
    assert placement.place_decode((), 100, prompt=a_prompt("d2")).worker == chosen


def test_a_conversation_returns_to_the_decoder_that_has_it() -> None:
    placement = a_placement(view("d1", "decode"), view("d2", "decode"))
    hashes = tuple(range(20))
    first = placement.place_decode(hashes, 325)
    assert (first.amount, first.num_cached_tokens) == (21, 0)
    placement.end(first)
    again = placement.place_decode((*hashes, 77), 340)
    assert (again.worker, again.amount, again.num_cached_tokens) == (first.worker, 2, 320)


# --- seconds of devices --------------------------------------------------------------------------------------------------


def worked(name: str, *stages: StageLoad) -> WorkerView:
    return WorkerView(WorkerId(name), stages)


def test_a_worker_that_is_twice_as_fast_gets_twice_as_much() -> None:
    placement = a_placement(
        worked("fast", StageLoad("prefill", busy_s=1.0, num_tokens=20_000)),
        worked("slow", StageLoad("prefill", busy_s=1.0, num_tokens=10_000)),
    )
    assert Counter(placement.place_prefill((), 100).worker for _ in range(30)) == {"fast": 20, "slow": 10}


def test_images_keep_off_a_worker_that_has_prompts_to_compute() -> None:
    placement = a_placement(view("w1", "encode", "prefill"), view("w2", "encode", "prefill"))
    busy = placement.place_prefill((), 1000)
    images = [placement.place_encode(an_image(f"i{number}", 100)).worker for number in range(4)]
    assert set(images) == {"w1", "w2"} - {busy.worker}


def test_a_prompt_keeps_off_a_worker_that_has_images_to_encode() -> None:
    placement = a_placement(view("w1", "encode", "prefill"), view("w2", "encode", "prefill"))
    busy = placement.place_encode(an_image("i", 1000))
    assert placement.place_prefill((), 10).worker != busy.worker


def test_an_image_and_a_prompt_weigh_what_they_take() -> None:
    stages = (StageLoad("encode", busy_s=1.0, num_tokens=1000), StageLoad("prefill", busy_s=1.0, num_tokens=10_000))
    placement = a_placement(worked("w1", *stages), worked("w2", *stages))
    busy = placement.place_encode(an_image("i", 100))  # 0.1 s
    assert [placement.place_prefill((), 900).worker == busy.worker for _ in range(2)] == [False, False]  # 0.09 s each
    assert placement.place_prefill((), 900).worker == busy.worker


def test_a_request_s_own_prompt_does_not_keep_its_images_away() -> None:
    """It waits for them: the first of them might as well be encoded where it is prefilled, the second would be in the way."""
    placement = a_placement(view("w1", "encode", "prefill"), view("w2", "encode", "prefill"))
    prompt = placement.place_prefill((), 1000)
    images = {placement.place_encode(an_image(f"i{number}", 100), of=(prompt,)).worker for number in range(2)}
    assert images == {"w1", "w2"}


def test_a_later_image_keeps_off_the_prompt_that_is_computed_before_it() -> None:
    placement = a_placement(view("w1", "encode", "prefill"), view("w2", "encode", "prefill"))
    prompt = placement.place_prefill((), 1000)
    for offset, is_near in ((4, True), (500, False)):
        image = placement.place_encode(msgspec.structs.replace(an_image(f"at {offset}", 100), offset=offset), of=(prompt,))
        assert (image.worker == prompt.worker) == is_near
        placement.end(image)


def test_an_image_is_encoded_where_it_is_prefilled_if_no_other_place_is_better() -> None:
    stages = ("encode", "prefill", "decode")
    placement = a_placement(view("w1", *stages), view("w2", *stages))
    placement.end(placement.place_encode(an_image("before")))  # so that the next image's turn is another worker's
    for number in range(6):
        prompt = placement.place_prefill((), 1000)
        decode = placement.place_decode((), 1000, prompt=prompt)
        image = placement.place_encode(an_image(f"i{number}", 100), of=(prompt, decode))
        assert image.worker == prompt.worker == decode.worker
        for each in (image, prompt, decode):
            placement.end(each)


def test_work_keeps_off_workers_that_will_stream() -> None:
    """What is to be decoded there has not been prefilled yet, and no report shows it."""
    stages = ("encode", "prefill", "decode")
    placement = a_placement(view("w1", *stages), view("w2", *stages))
    decode = placement.place_decode((), 100)
    assert placement.place_encode(an_image("i", 100)).worker != decode.worker


def test_work_keeps_off_workers_that_stream() -> None:
    stages = ("encode", "prefill", "decode")
    placement = a_placement(view("w1", *stages, running=3), view("w2", *stages, running=1), view("w3", *stages))
    images = Counter(placement.place_encode(an_image(f"i{number}", 100)).worker for number in range(4))
    assert images == {"w3": 2, "w2": 1, "w1": 1}  # two there, one after the other, take as long as one that is felt elsewhere


def test_decode_goes_where_little_else_is_to_be_done_unless_that_is_elsewhere_and_not_worth_the_way() -> None:
    stages = ("prefill", "decode")
    placement = a_placement(view("w1", *stages), view("w2", *stages))
    prompt = placement.place_prefill((), 100)
    assert placement.place_decode((), 100, prompt=prompt).worker == prompt.worker  # its own prompt is not in its way
    placement = a_placement(view("w1", *stages), view("w2", *stages, tokens=1000))
    prompt = Assignment("prefill", WorkerId("w2"), 100, 0, ())
    assert placement.place_decode((), 100, prompt=prompt).worker == "w1"
    long = Assignment("prefill", WorkerId("w2"), 2000, 0, ())
    assert a_placement(view("w1", *stages), view("w2", *stages, tokens=1000)).place_decode((), 2000, prompt=long).worker == "w2"


def test_decode_loads_that_are_about_equal_do_not_move_a_request() -> None:
    placement = a_placement(view("w1", "prefill", "decode", running=19), view("w2", "prefill", "decode", running=20))
    assert placement.place_decode((), 16, prompt=Assignment("prefill", WorkerId("w2"), 16, 0, ())).worker == "w2"
    assert placement.place_decode((), 16).worker == "w1"  # with nothing to be gained it is the shorter step


# --- the view -----------------------------------------------------------------------------------------------------------


def test_what_was_given_since_the_report_counts_beside_it() -> None:
    placement = a_placement(view("e1", "encode", tokens=100), view("e2", "encode", tokens=220))
    assert [placement.place_encode(an_image(f"i{number}")).worker for number in range(3)] == ["e1", "e1", "e2"]


def test_a_report_that_shows_our_own_work_does_not_count_it_twice() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode"))
    assert placement.place_encode(an_image("a", 100)).worker == "e1"
    placement.update([view("e1", "encode", tokens=100), view("e2", "encode", tokens=150)])
    assert placement.place_encode(an_image("b", 10)).worker == "e1"


def test_a_late_report_does_not_hide_our_own_work() -> None:
    placement = a_placement(view("e1", "encode"), view("e2", "encode"))
    assert placement.place_encode(an_image("a", 100)).worker == "e1"
    placement.update([view("e1", "encode", tokens=0), view("e2", "encode", tokens=50)])
    assert placement.place_encode(an_image("b", 10)).worker == "e2"


def test_a_report_of_another_worker_says_nothing_of_this_one() -> None:
    """What this one reported included work of ours that has ended since."""
    placement = a_placement(view("p1", "prefill"), view("p2", "prefill"))
    placed = placement.place_prefill((), 100)
    assert placed.worker == "p1"
    shown = view("p1", "prefill", tokens=100)
    placement.update([shown, view("p2", "prefill")])
    placement.end(placed)
    placement.update([shown, view("p2", "prefill", tokens=50)])
    assert placement.place_prefill((), 10).worker == "p1"


def test_ended_work_does_not_count_and_ends_once() -> None:
    placement = a_placement(view("p1", "prefill"), view("p2", "prefill"))
    placed = placement.place_prefill((), 100)
    assert placement.num_given(placed.worker, "prefill") == 1
    placement.end(placed)
    placement.end(placed)
    assert placement.num_given(placed.worker, "prefill") == 0
    placement.check_integrity()


def test_draining_and_dead_workers_get_nothing() -> None:
    placement = a_placement(
        view("e1", "encode", is_draining=True),
        view("e2", "encode", is_alive=False),
        view("e3", "encode", "prefill"),
        view("p", "prefill"),
    )
    assert placement.candidates("encode") == ("e3",)
    assert placement.candidates("prefill") == ("e3", "p")
    assert placement.candidates("decode") == ()
    with pytest.raises(Unavailable, match="no decode worker"):
        placement.place_decode((), 1)


def test_a_worker_that_leaves_takes_its_caches_and_counts_with_it() -> None:
    placement = a_placement(view("e1", "encode"))
    old = placement.place_encode(an_image("a"))
    placement.update([])
    with pytest.raises(Unavailable):
        placement.place_encode(an_image("a"))
    placement.update([view("e1", "encode")])
    again = placement.place_encode(an_image("a"))
    assert again.num_cached_tokens == 0
    placement.end(old)
    assert placement.num_given(WorkerId("e1"), "encode") == 1
    placement.check_integrity()


def test_a_role_that_a_worker_gives_up_is_gone() -> None:
    placement = a_placement(view("w", "encode", "prefill"))
    placed = placement.place_prefill((), 10)
    placement.update([view("w", "encode")])
    assert placement.candidates("prefill") == ()
    placement.end(placed)
    placement.check_integrity()


def test_damage_is_found() -> None:
    placement = a_placement(view("w", "prefill"))
    placement.place_prefill((), 10)
    placement._members[WorkerId("w")].stages["prefill"].amount += 1
    with pytest.raises(InternalError, match="w has 10 outstanding in prefill, 11 are counted"):
        placement.check_integrity()


class PlacementMachine(RuleBasedStateMachine):
    """The twin keeps what is outstanding; without other gateways and reports, the choice is the least of that."""

    @initialize(num_workers=st.integers(1, 4))
    def start(self, num_workers: int) -> None:
        self.workers = [WorkerId(f"w{number}") for number in range(num_workers)]
        self.placement = Placement(block_size=BLOCK)
        self.outstanding: list[Assignment] = []
        self.num_images = 0
        self.draining: set[WorkerId] = set()
        self.refresh()

    def amounts(self, role: str) -> Counter[WorkerId]:
        found: Counter[WorkerId] = Counter()
        for assignment in self.outstanding:
            if assignment.role == role:
                found[assignment.worker] += assignment.amount
        return found

    def usable(self) -> list[WorkerId]:
        return [worker for worker in self.workers if worker not in self.draining]

    @rule()
    def refresh(self) -> None:
        """Reports that show exactly our own work, or nothing of it yet."""
        encode, prefill = self.amounts("encode"), self.amounts("prefill")
        self.placement.update(
            WorkerView(
                w,
                (StageLoad("encode", outstanding_tokens=encode[w]), StageLoad("prefill", outstanding_tokens=prefill[w])),
                is_draining=w in self.draining,
            )
            for w in self.workers
        )

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.draining ^= {data.draw(st.sampled_from(self.workers))}
        self.refresh()

    @rule(size=st.integers(1, 100), is_image=st.booleans(), avoid=st.sets(st.sampled_from(["w0", "w1", "w2"])))
    def place(self, size: int, is_image: bool, avoid: set[str]) -> None:
        self.num_images += 1
        role = "encode" if is_image else "prefill"
        item = an_image(f"i{self.num_images}", size)
        avoided = [WorkerId(name) for name in avoid]
        if not self.usable():
            with pytest.raises(Unavailable):
                self.placement.place_prefill((), size)
            return
        amounts = self.amounts("encode") + self.amounts("prefill")  # the two stages of a worker share its device
        if is_image:
            placed = self.placement.place_encode(item, avoid=avoided)
        else:
            placed = self.placement.place_prefill((), size, avoid=avoided)
        choice = [worker for worker in self.usable() if worker not in avoided] or self.usable()
        assert placed.worker in choice
        assert amounts[placed.worker] == min(amounts[worker] for worker in choice)
        assert (placed.role, placed.amount) == (role, size)
        self.outstanding.append(placed)

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        placed = self.outstanding.pop(data.draw(st.integers(0, len(self.outstanding) - 1)))
        self.placement.end(placed, failed=failed)

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self.placement.forget(worker)
        self.outstanding = [placed for placed in self.outstanding if placed.worker != worker]
        self.refresh()

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "placement"):
            self.placement.check_integrity()
            given = Counter((placed.worker, placed.role) for placed in self.outstanding)
            for worker, role in product(self.workers, ("encode", "prefill")):
                assert self.placement.num_given(worker, role) == given[worker, role]


TestPlacementMachine = PlacementMachine.TestCase
TestPlacementMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
