from __future__ import annotations

import threading

import pytest

from epd.emulated.cost import TextWork
from epd.emulated.device import EmulatedDevice, Sharing, Work, choose, cost_s
from epd.errors import InternalError
from tests.emulated.profiles import PROFILE


class StepClock:
    """Time passes by sleeping, and then `overshoot` more than was asked for. Sleep waits until the gate is open."""

    def __init__(self, overshoot: float = 0.0) -> None:
        self._now = 100.0
        self._overshoot = overshoot
        self.gate = threading.Event()
        self.gate.set()
        self.slept_until: list[float] = []

    def now(self) -> float:
        return self._now

    def sleep_until(self, when: float) -> None:
        assert self.gate.wait(20), "nobody opened the gate"
        self.slept_until.append(when)
        self._now = max(self._now, when + self._overshoot)


def _prompt(rows: int = 64) -> Work:
    return Work("prefill", text=TextWork(rows))


def _tokens(rows: int = 8) -> Work:
    return Work("decode", text=TextWork(rows))


def _images(*patches: int) -> Work:
    return Work("encode", patches=patches)


def test_prefill_first_takes_images_then_prompts_then_tokens_one_at_a_time() -> None:
    waiting = [_tokens(), _prompt(), _images(10), _prompt()]
    assert choose(waiting, Sharing.PREFILL_FIRST, "") == [waiting[2]]
    assert choose([waiting[0], waiting[1], waiting[3]], Sharing.PREFILL_FIRST, "") == [waiting[1]]


def test_fused_takes_one_prompt_step_with_one_token_step_and_images_in_turn() -> None:
    first, second, tokens, images = _prompt(), _prompt(), _tokens(), _images(10)
    assert choose([first, tokens, second], Sharing.FUSED, "") == [first, tokens]
    assert choose([first, tokens, images], Sharing.FUSED, "prefill") == [images]
    assert choose([first, tokens, images], Sharing.FUSED, "encode") == [first, tokens]
    assert choose([images], Sharing.FUSED, "encode") == [images]


def test_a_batch_costs_what_its_parts_cost_together() -> None:
    assert cost_s(PROFILE, [_prompt(140), _tokens(10)]) == pytest.approx(0.015)
    assert cost_s(PROFILE, [_images(400, 600)]) == pytest.approx(0.1)


def test_work_that_waits_follows_without_a_gap_however_late_the_thread_wakes() -> None:
    clock = StepClock(overshoot=0.003)
    clock.gate.clear()
    device = EmulatedDevice(PROFILE, clock=clock)
    works = [device.launch(_tokens()) for _ in range(3)]
    clock.gate.set()
    for work in works:
        work.done.result(timeout=20)
    assert clock.slept_until == pytest.approx([100.010, 100.020, 100.030])
    assert device.busy_s == pytest.approx(0.030)
    assert device.late_s == pytest.approx(0.009)
    device.close()


def test_an_idle_device_starts_when_work_comes() -> None:
    clock = StepClock()
    device = EmulatedDevice(PROFILE, clock=clock)
    device.launch(_tokens()).done.result(timeout=20)
    clock._now += 5.0
    device.launch(_tokens()).done.result(timeout=20)
    assert clock.slept_until == pytest.approx([100.010, 105.020])
    device.close()


def test_closing_fails_what_waits() -> None:
    clock = StepClock()
    clock.gate.clear()
    device = EmulatedDevice(PROFILE, clock=clock)
    running, waiting = device.launch(_tokens()), device.launch(_tokens())
    closing = threading.Thread(target=device.close)
    closing.start()
    clock.gate.set()
    closing.join(20)
    assert running.done.done()
    assert waiting.done.done()
    with pytest.raises(InternalError, match="closed"):
        device.launch(_tokens())


def test_work_that_finds_a_device_with_a_beat_idle_begins_on_it() -> None:
    clock = StepClock()
    device = EmulatedDevice(PROFILE, clock=clock, beat_s=0.5, phase_s=0.2)
    try:
        device.launch(_tokens()).done.result(20)  # at 100.0
        device.launch(_tokens()).done.result(20)  # at once after it
    finally:
        device.close()
    assert clock.slept_until == pytest.approx([100.21, 100.22])
    assert device.busy_s == pytest.approx(0.02)
