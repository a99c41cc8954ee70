"""draw_token against the definition, at the edges of every token's share."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.kernels.draw_token import draw_token


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_is_where_the_sum_passes_the_noise(size: int, temperature: float) -> None:
    random = np.random.default_rng(size)
    logits = random.standard_normal(size, np.float32) * 3
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    sums = np.cumsum(weights) / weights.sum()
    for noise in random.random(200):
        if np.abs(sums - noise).min() > 1e-6:  # nearer than that, rounding may decide
            assert draw_token(logits, temperature, float(noise)) == np.searchsorted(sums, noise, side="right")


def test_equal_tokens_share_equally() -> None:
    logits = np.zeros(1000, np.float32)
    assert [draw_token(logits, 0.7, (i + 0.5) / 1000) for i in range(1000)] == list(range(1000))


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
def test_what_has_no_weight_is_never_drawn(noise: float) -> None:
    logits = np.full(600, -np.inf, np.float32)
    logits[300] = 1.0
    assert draw_token(logits, 1.0, noise) == 300
    logits[300:302] = -1e30, 5.0
    assert draw_token(logits, 1.0, noise) == 301


def test_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="no token"):
        draw_token(np.empty(0, np.float32), 1.0, 0.5)
