"""Who is let in, and when those who are not may come back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.errors import BadConfig, InternalError, Overloaded
from epd.gateway.admission import Admission
from protocol.messages import RequestId


def rid(number: int) -> RequestId:
    return RequestId(f"r{number}")


def refused(admission: Admission, now: float, *, num_prompt_tokens: int = 1, num_choices: int = 1) -> float:
    """Asks, is refused, and returns when to come back."""
    with pytest.raises(Overloaded) as caught:
        admission.admit(RequestId("refused"), num_prompt_tokens=num_prompt_tokens, now=now, num_choices=num_choices)
    return caught.value.retry_after_s


def test_requests_are_let_in_up_to_the_limit_and_again_when_one_has_ended() -> None:
    admission = Admission(max_requests=2, max_prompt_tokens=1000)
    admission.admit(rid(1), num_prompt_tokens=10, now=0.0)
    admission.admit(rid(2), num_prompt_tokens=20, now=0.0)
    refused(admission, 1.0)
    assert (admission.num_running, admission.num_prompt_tokens) == (2, 30)
    admission.finish(rid(1), now=2.0)
    admission.admit(rid(3), num_prompt_tokens=10, now=2.0)
    assert (admission.num_running, admission.num_prompt_tokens) == (2, 30)


def test_outstanding_prompt_tokens_are_bounded() -> None:
    admission = Admission(max_requests=10, max_prompt_tokens=100)
    admission.admit(rid(1), num_prompt_tokens=60, now=0.0)
    refused(admission, 0.0, num_prompt_tokens=41)
    admission.admit(rid(2), num_prompt_tokens=40, now=0.0)
    refused(admission, 0.0, num_prompt_tokens=1)


def test_each_choice_counts() -> None:
    admission = Admission(max_requests=4, max_prompt_tokens=1000)
    admission.admit(rid(1), num_prompt_tokens=10, now=0.0, num_choices=3)
    refused(admission, 0.0, num_choices=2)
    admission.admit(rid(2), num_prompt_tokens=10, now=0.0)
    admission.finish(rid(1), now=1.0)
    assert admission.num_running == 1


def test_alone_a_request_of_any_size_is_let_in() -> None:
    admission = Admission(max_requests=1, max_prompt_tokens=10)
    admission.admit(rid(1), num_prompt_tokens=99, now=0.0, num_choices=5)
    refused(admission, 0.0)
    admission.finish(rid(1), now=1.0)
    assert admission.is_idle()


def test_the_message_gives_the_counts() -> None:
    admission = Admission(max_requests=1, max_prompt_tokens=10)
    admission.admit(rid(1), num_prompt_tokens=7, now=0.0)
    with pytest.raises(Overloaded, match="1 requests of at most 1 run, with 7 prompt tokens of at most 10: try again in 1 s"):
        admission.admit(rid(2), num_prompt_tokens=1, now=0.0)


# --- when to come back --------------------------------------------------------------------------------------------------


def busy(*, max_requests: int, every_s: float, until: float) -> Admission:
    """Full since 0, with one request finishing and one coming in every so often."""
    admission = Admission(max_requests=max_requests, max_prompt_tokens=10**6)
    for number in range(max_requests):
        admission.admit(rid(number), num_prompt_tokens=100, now=0.0)
    number = 0
    while (number + 1) * every_s <= until:
        now = (number + 1) * every_s
        admission.finish(rid(number), now=now)
        admission.admit(rid(number + max_requests), num_prompt_tokens=100, now=now)
        number += 1
    return admission


def test_retry_follows_the_rate_at_which_requests_finish() -> None:
    assert refused(busy(max_requests=8, every_s=0.5, until=20.0), 20.0) == 1.0  # the least
    assert refused(busy(max_requests=8, every_s=4.0, until=20.0), 20.0) == pytest.approx(4.0)


def test_refused_clients_are_spread_out() -> None:
    admission = busy(max_requests=8, every_s=2.0, until=20.0)
    waits = [refused(admission, 20.0) for _ in range(5)]
    assert waits == pytest.approx([2.0, 4.0, 6.0, 8.0, 10.0])
    assert refused(admission, 25.0) == pytest.approx(8.0 * 25 / 20)  # two came back, three still stand in line, and it got slower


def test_what_needs_more_room_waits_for_more_to_finish() -> None:
    admission = busy(max_requests=8, every_s=2.0, until=20.0)
    assert refused(admission, 20.0, num_choices=4) == pytest.approx(8.0)
    admission = busy(max_requests=8, every_s=2.0, until=20.0)
    assert refused(admission, 20.0, num_prompt_tokens=10**6 - 500) == pytest.approx(2.0 * 8 * 300 / 800)


def test_before_anything_has_finished_the_time_so_far_is_the_measure() -> None:
    admission = Admission(max_requests=1, max_prompt_tokens=100)
    admission.admit(rid(1), num_prompt_tokens=1, now=100.0)
    assert refused(admission, 100.0) == 1.0
    admission = Admission(max_requests=1, max_prompt_tokens=100)
    admission.admit(rid(1), num_prompt_tokens=1, now=100.0)
    assert refused(admission, 112.0) == pytest.approx(12.0)


def test_a_quiet_night_does_not_count_against_the_morning() -> None:
    admission = busy(max_requests=2, every_s=1.0, until=10.0)
    admission.finish(rid(10), now=10.0)
    admission.finish(rid(11), now=10.0)
    admission.admit(rid(100), num_prompt_tokens=1, now=50_000.0)
    admission.admit(rid(101), num_prompt_tokens=1, now=50_000.0)
    assert refused(admission, 50_001.0) == 1.0


def test_what_finished_before_a_pause_says_nothing_about_now() -> None:
    admission = busy(max_requests=2, every_s=1.0, until=10.0)
    admission.finish(rid(10), now=10.0)
    admission.finish(rid(11), now=10.0)
    admission.admit(rid(100), num_prompt_tokens=1, now=15.0)
    admission.admit(rid(101), num_prompt_tokens=1, now=15.0)
    assert refused(admission, 20.0) == pytest.approx(5.0)


def test_nobody_is_sent_away_for_longer_than_a_minute() -> None:
    admission = busy(max_requests=2, every_s=29.0, until=30.0)
    assert max(refused(admission, 30.0) for _ in range(10)) == 60.0


# --- misuse -------------------------------------------------------------------------------------------------------------


def test_a_request_is_in_once_and_ends_once() -> None:
    admission = Admission(max_requests=2, max_prompt_tokens=100)
    admission.admit(rid(1), num_prompt_tokens=1, now=0.0)
    with pytest.raises(InternalError, match="in already"):
        admission.admit(rid(1), num_prompt_tokens=1, now=0.0)
    admission.finish(rid(1), now=1.0)
    with pytest.raises(InternalError, match="is not in"):
        admission.finish(rid(1), now=1.0)


@pytest.mark.parametrize(("max_requests", "max_prompt_tokens"), [(0, 1), (1, 0)])
def test_limits_that_cannot_work_are_refused(max_requests: int, max_prompt_tokens: int) -> None:
    with pytest.raises(BadConfig):
        Admission(max_requests=max_requests, max_prompt_tokens=max_prompt_tokens)


def test_damage_is_found() -> None:
    admission = Admission(max_requests=2, max_prompt_tokens=100)
    admission.admit(rid(1), num_prompt_tokens=1, now=0.0)
    admission._num_running += 1
    with pytest.raises(InternalError, match="admission: 2 choices"):
        admission.check_integrity()


class AdmissionMachine(RuleBasedStateMachine):
    """The twin adds up what is in."""

    @initialize(max_requests=st.integers(1, 6), max_prompt_tokens=st.integers(1, 60))
    def start(self, max_requests: int, max_prompt_tokens: int) -> None:
        self.limits = (max_requests, max_prompt_tokens)
        self.admission = Admission(max_requests=max_requests, max_prompt_tokens=max_prompt_tokens)
        self.inside: dict[RequestId, tuple[int, int]] = {}
        self.now = 0.0
        self.num_asked = 0

    def sums(self) -> tuple[int, int]:
        return sum(choices for choices, _ in self.inside.values()), sum(tokens for _, tokens in self.inside.values())

    @rule(passed=st.sampled_from([0.0, 0.1, 1.0, 40.0]))
    def wait(self, passed: float) -> None:
        self.now += passed

    @rule(num_prompt_tokens=st.integers(1, 30), num_choices=st.integers(1, 3))
    def ask(self, num_prompt_tokens: int, num_choices: int) -> None:
        self.num_asked += 1
        running, tokens = self.sums()
        fits = running + num_choices <= self.limits[0] and tokens + num_prompt_tokens <= self.limits[1]
        if fits or not self.inside:
            self.admission.admit(rid(self.num_asked), num_prompt_tokens=num_prompt_tokens, now=self.now, num_choices=num_choices)
            self.inside[rid(self.num_asked)] = (num_choices, num_prompt_tokens)
        else:
            wait_s = refused(self.admission, self.now, num_prompt_tokens=num_prompt_tokens, num_choices=num_choices)
            assert 1.0 <= wait_s <= 60.0

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.inside)))
        del self.inside[request_id]
        self.admission.finish(request_id, now=self.now)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "admission"):
            self.admission.check_integrity()
            assert (self.admission.num_running, self.admission.num_prompt_tokens) == self.sums()
            assert self.admission.is_idle() == (not self.inside)


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
