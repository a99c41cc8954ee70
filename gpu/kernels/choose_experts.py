"""choose_experts: which experts a token's feed-forward goes to, and how much of each (top-k gating, Shazeer et al. 2017)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import expect
from gpu.kernels.compiler import kernel
from gpu.kernels.fast_exp import fast_exp

Float = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_NONE = np.float32(-np.inf)


def choose_experts(logits: Float, normalizes: bool, chosen: Ids, shares: Float) -> None:
    """The most probable experts of each row, the likeliest first, of equal ones the lower; and their softmax over all experts.

    logits: float32 [n, num_experts], spoilt; chosen: int64 [n, k], k of 1 to num_experts; shares: float32 [n, k]. All contiguous.
    `normalizes`: shares of a row add up to 1. A row with a NaN chooses some expert. Raises ValueError for shapes.
    """
    num_rows, num_chosen = chosen.shape
    expect(logits, (num_rows, logits.shape[1]), "logits")
    expect(shares, chosen.shape, "shares")
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"{num_chosen} of {logits.shape[1]} experts")
    _choose_experts(logits, normalizes, chosen, shares)


@kernel("void(float32[:,::1], boolean, int64[:,::1], float32[:,::1])")
def _choose_experts(logits: Float, normalizes: bool, chosen: Ids, shares: Float) -> None:
    num_experts, num_chosen = logits.shape[1], chosen.shape[1]
    for row in range(logits.shape[0]):
        top = logits[row, 0]
        for i in range(num_experts):
            top = max(top, logits[row, i])
        whole = np.float32(0.0)
        for i in range(num_experts):
            whole += fast_exp(logits[row, i] - top)
        taken = np.float32(0.0)
        for place in range(num_chosen):
            best, value = 0, _NONE
            for i in range(num_experts):
                if logits[row, i] > value:
                    best, value = i, logits[row, i]
            chosen[row, place] = best
            shares[row, place] = fast_exp(value - top)
            taken += shares[row, place]
            logits[row, best] = _NONE
        for place in range(num_chosen):
            shares[row, place] /= taken if normalizes else whole
