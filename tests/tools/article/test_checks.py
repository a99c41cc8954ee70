"""Predicted beside measured: the error's sign, what is over the limit, and which step a stream's gaps are held against."""

from __future__ import annotations

import math
from array import array

import pytest

from epd.emulated.cost import TextWork, text_s
from epd.emulated.profile import load_profile
from epd.sizing.predict import capacity
from tests.emulated.profiles import PROFILE
from tools.article.check_cpu import compare
from tools.article.check_plan import Figure, cases_of, predictor, render
from tools.article.check_steps import figure
from tools.article.workloads import WORKLOADS
from tools.loadgen.load import Run
from tools.loadgen.stats import summarise
from tools.loadgen.stream import FAILED, OK, Record


def test_an_error_is_how_far_the_prediction_is_above_the_run() -> None:
    assert Figure("s", "n", "u", 1.2, 1.0).error == pytest.approx(0.2)
    assert Figure("s", "n", "u", 1.0, 0.0).error == math.inf
    over, unchecked, fine = (
        Figure("s", "a", "u", 1.2, 1.0),
        Figure("s", "b", "u", 1.2, 1.0, is_checked=False),
        Figure("s", "c", "u", 1.1, 1.0),
    )
    lines = render([over, unchecked, fine]).splitlines()[2:]
    assert ["(over)" in line for line in lines] == [True, False, False]
    assert "+20.0 %" in lines[0]


def test_every_case_has_a_prediction_for_what_is_run() -> None:
    profile = load_profile("h200-qwen3-vl-8b")
    for case in cases_of(profile):
        assert case.workload in WORKLOADS
        assert 1 < capacity(predictor(case, profile)) < 1000
        if case.split is not None:
            roles = [sum(role in each.split(",") for each in case.topology.workers) for role in ("prefill", "decode")]
            assert roles == [case.split.prefill, case.split.decode]
            assert case.topology.workers.count("encode") == case.split.encode
        assert len(case.topology.workers) == 8


def stream(step_s: float, start_s: float, tokens: int = 200, outcome: str = OK) -> Record:
    times = array("d", [start_s + step_s * number for number in range(tokens)])
    return Record(0, 0.0, 0.0, piece_times_s=times, end_s=times[-1], outcome=outcome, output_tokens=tokens)


def test_a_step_is_held_against_the_curve_at_its_batch_and_context() -> None:
    exact = text_s(PROFILE, TextWork(4, 0, 4 * 600))
    got = figure(PROFILE, [stream(2 * exact, 0.001 * number) for number in range(4)], 4, 500, 2.0)
    assert got.measured == pytest.approx(exact)
    assert abs(got.error) < 0.001
    slow = figure(PROFILE, [stream(2.2 * exact, 0.0) for _ in range(4)], 4, 500, 2.0)
    assert slow.error == pytest.approx(1 / 1.1 - 1, abs=0.001)


def test_two_runs_that_did_not_do_the_same_work_are_not_compared() -> None:
    good = summarise(Run(0.0, 10.0, records=[stream(0.01, 1.0)]))
    bad = summarise(Run(0.0, 10.0, records=[stream(0.01, 1.0, outcome=FAILED)]))
    assert [each.error for each in compare(good, good)] == [0.0] * 4
    with pytest.raises(RuntimeError, match="emulated: 0 of 1"):
        compare(good, bad)
