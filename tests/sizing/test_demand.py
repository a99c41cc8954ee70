from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.sizing.demand import decode_step_s, demand, encoding_s, num_chunks, prefill_s, steady_batch
from tests.sizing.cases import DEVICE, IMAGES, MIXED, TEXT, sizing


def test_a_prompt_is_its_chunks() -> None:
    assert prefill_s(DEVICE, 1000, 500) == pytest.approx(2 * 0.050)
    assert prefill_s(DEVICE, 1000, 1 << 30) == pytest.approx(0.100)
    assert prefill_s(DEVICE, 50, 500) == pytest.approx(0.010)
    assert num_chunks(DEVICE, 1001, 500) == 3


def test_tokens_beside_a_chunk_lengthen_its_step() -> None:
    alone = prefill_s(DEVICE, 500, 500)
    assert prefill_s(DEVICE, 500, 500, beside=10, context=1000.0) == pytest.approx(alone + 10 * 0.0001 + 10 * 1000 * 1e-6)


def test_what_a_mean_request_costs() -> None:
    text, images, mixed = (demand(DEVICE, each, sizing(each).steps) for each in (TEXT, IMAGES, MIXED))
    assert encoding_s(DEVICE, IMAGES.kinds[0]) == images.encode_s == pytest.approx(0.2)
    assert (text.encode_s, text.decode_tokens, text.context) == (0.0, 50.0, 1025.5)
    assert mixed.encode_s == pytest.approx(0.05)
    assert mixed.prefill_s == pytest.approx(0.75 * text.prefill_s + 0.25 * images.prefill_s)
    assert images.encode_cv2 == pytest.approx(0.0)
    assert mixed.encode_cv2 == pytest.approx(3.0)  # a quarter of the requests has all of it


@given(st.floats(1.0, 4000.0), st.floats(0.0, 3000.0), st.floats(0.1, 1.0))
def test_the_steady_batch_draws_as_many_tokens_as_are_asked_for(speed: float, context: float, share: float) -> None:
    batch = steady_batch(DEVICE, speed, context, share=share, most=100)
    if batch == float("inf"):
        assert 100 * share / decode_step_s(DEVICE, 100, context) <= speed
    else:
        near = 1e-3 if batch >= 1 else 0.3  # below one, steps are as if of one
        assert share * batch / decode_step_s(DEVICE, batch, context) == pytest.approx(speed, rel=near)


def test_no_tokens_need_no_batch_and_no_time_draws_none() -> None:
    assert steady_batch(DEVICE, 0.0, 10.0, most=8) == 0.0
    assert steady_batch(DEVICE, 1.0, 10.0, share=0.0, most=8) == float("inf")
