from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.sizing.predict import Predictor, Split, capacity, highest_rate, sessions_at, with_sessions
from epd.sizing.workload import Workload
from tests.sizing.cases import IMAGES, MIXED, TEXT, sizing

SERVICES: list[tuple[str, Predictor]] = [
    service
    for kind, workload in (("text", TEXT), ("images", IMAGES), ("mixed", MIXED))
    for service in (
        (f"apart, {kind}", sizing(workload).apart(Split(2, 3, 1))),
        (f"prefill first, {kind}", sizing(workload).together(6, fused=False)),
        (f"fused, {kind}", sizing(workload).together(6, fused=True)),
        (f"shared front, {kind}", sizing(workload).apart(Split(0, 5, 1))),
        (f"pooled, {kind}", sizing(workload).pooled(6)),
    )
]


def alone(workload: Workload, split: Split) -> float:
    return sizing(workload).apart(split)(1e-9).ttft_s


def test_the_first_token_of_a_request_that_is_alone() -> None:
    assert alone(TEXT, Split(0, 1, 1)) == pytest.approx(0.100)
    # Two encoders: 50 ms to patches, 100 ms to embeddings, both at once; then a prompt of 600 tokens (60 ms).
    assert alone(IMAGES, Split(2, 1, 1)) == pytest.approx(0.150 + 0.060, abs=0.001)
    # One encoder: the second image comes 100 ms later; half of the prompt is prefilled by then.
    assert alone(IMAGES, Split(1, 1, 1)) == pytest.approx(0.250 + 0.035, abs=0.001)
    together = sizing(IMAGES).together(1, fused=False)(1e-9)
    assert together.ttft_s == pytest.approx(0.050 + 0.200 + 0.060, abs=0.006)


def test_a_stage_is_busy_with_its_work() -> None:
    at = sizing(MIXED).apart(Split(1, 2, 1))(4.0)
    assert at.busy["encode"] == pytest.approx(4.0 * 0.05)
    assert at.busy["prefill"] == pytest.approx(4.0 * sizing(MIXED).demand().prefill_s / 2)
    assert at.bottleneck == "decode"


def test_without_an_encode_device_those_of_prefill_encode() -> None:
    need = sizing(IMAGES).demand()
    each_s = need.encode_s + need.prefill_s
    assert capacity(sizing(IMAGES).apart(Split(0, 1, 4))) == pytest.approx(1 / each_s, rel=0.01)
    assert capacity(sizing(IMAGES).apart(Split(0, 2, 4))) == pytest.approx(2 / each_s, rel=0.01)
    assert sizing(IMAGES).apart(Split(0, 1, 1))(1.0).busy["encode+prefill"] == pytest.approx(each_s)
    assert capacity(sizing(TEXT).apart(Split(0, 1, 1))) == pytest.approx(10.0, rel=0.01)
    assert "encode" not in sizing(TEXT).apart(Split(0, 1, 1))(1.0).busy


def test_images_that_spread_come_sooner_than_on_one_device() -> None:
    together, pooled = sizing(IMAGES).together(4, fused=True)(1e-9), sizing(IMAGES).pooled(4)(1e-9)
    assert pooled.ttft_s == pytest.approx(together.ttft_s - 0.100, abs=0.005)  # one of two images, encoded meanwhile
    assert alone(IMAGES, Split(0, 2, 1)) == pytest.approx(alone(IMAGES, Split(2, 1, 1)))
    assert capacity(sizing(IMAGES).pooled(4)) == pytest.approx(capacity(sizing(IMAGES).together(4, fused=True)))


@pytest.mark.parametrize(("name", "predict"), SERVICES)
def test_more_load_is_never_faster(name: str, predict: Predictor) -> None:
    most = capacity(predict)
    before = predict(0.01 * most)
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        at = predict(share * most)
        assert at.ttft_s >= before.ttft_s - 1e-9, name
        assert at.itl_s >= before.itl_s - 1e-9
        assert at.ttft_p90_s >= at.ttft_s or "mixed" in name
        before = at
    assert predict(1.05 * most).e2e_s == math.inf


@pytest.mark.parametrize(("name", "predict"), SERVICES)
def test_the_highest_rate_keeps_the_latencies_and_a_higher_one_does_not(name: str, predict: Predictor) -> None:
    rate = highest_rate(predict, 1.0, 0.050)
    assert predict(rate).holds(1.0, 0.050), name
    assert not predict(1.01 * rate).holds(1.0, 0.050)
    assert sessions_at(predict, 1.0, 0.050) == pytest.approx(rate * predict(rate).e2e_s)


@settings(max_examples=12)
@given(st.floats(1.0, 60.0))
def test_users_who_wait_for_answers_are_as_many_as_rate_times_time(users: float) -> None:
    for name, predict in SERVICES:
        at = with_sessions(predict, users)
        assert at.rate * at.e2e_s <= users, name
        beyond = predict(at.rate * 1.01)
        assert beyond.rate * beyond.e2e_s > users


def test_targets_that_nothing_keeps() -> None:
    assert highest_rate(sizing(TEXT).apart(Split(0, 1, 1)), 0.01, 1.0) == 0.0
    assert sessions_at(sizing(TEXT).apart(Split(0, 1, 1)), 0.01, 1.0) == 0.0
