"""When an output ends."""

from __future__ import annotations

import pytest

from epd.finish import finish_reason
from protocol.messages import Sampling


@pytest.mark.parametrize(
    ("token_id", "num_output", "num_tokens", "sampling", "reason"),
    [
        (5, 1, 10, Sampling(max_tokens=2), ""),
        (5, 2, 11, Sampling(max_tokens=2), "length"),
        (5, 3, 12, Sampling(max_tokens=2), "length"),
        (5, 1, 100, Sampling(max_tokens=2), "length"),
        (5, 1, 99, Sampling(max_tokens=2), ""),
        (0, 1, 10, Sampling(max_tokens=9), "stop"),
        (1, 1, 10, Sampling(max_tokens=9), "stop"),
        (0, 9, 10, Sampling(max_tokens=9), "stop"),
        (0, 1, 10, Sampling(max_tokens=9, ignore_eos=True), ""),
        (0, 9, 10, Sampling(max_tokens=9, ignore_eos=True), "length"),
        (5, 1, 10, Sampling(max_tokens=9, stop_token_ids=(4, 5)), "stop"),
        (5, 1, 10, Sampling(max_tokens=9, stop_token_ids=(4, 5), ignore_eos=True), "stop"),
        (6, 1, 10, Sampling(max_tokens=9, stop_token_ids=(4, 5)), ""),
    ],
)
def test_an_output_ends_once_and_for_the_right_reason(
    token_id: int, num_output: int, num_tokens: int, sampling: Sampling, reason: str
) -> None:
    found = finish_reason(
        token_id, num_output=num_output, num_tokens=num_tokens, sampling=sampling, eos_token_ids={0, 1}, max_model_len=100
    )
    assert found == reason
