"""draw_token: one token from softmax(logits / temperature) over a whole vocabulary, for a given noise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.compiler import inlined, kernel
from gpu.kernels.fast_exp import fast_exp

Float = npt.NDArray[np.float32]

_LOWEST, _NOTHING = np.float32(-80.0), np.float32(0.0)
_RUN = 256  # tokens whose weights are summed before the sum is added to those before it


def draw_token(logits: Float, temperature: float, noise: float) -> int:
    """The first token at which the sum of weights exp(logits / temperature), in order of token id, passes `noise` of the whole.

    logits: float32 [vocab_size], contiguous; temperature > 0; 0 <= noise < 1. Weights are float32 (nothing below e**-80 of the
    likeliest) and sums float64. The vocabulary is read twice, and the run that the answer is in a third time. Raises ValueError
    for an empty vocabulary.
    """
    if not len(logits):
        raise ValueError("there is no token to draw")
    return _draw_token(logits, 1.0 / temperature, noise)


@inlined
def _weight(depth: np.float32) -> np.float32:
    return fast_exp(depth) if depth > _LOWEST else _NOTHING


@kernel("int64(float32[::1], float64, float64)")
def _draw_token(logits: Float, coldness: float, noise: float) -> int:
    size = logits.shape[0]
    factor = np.float32(coldness)
    top = logits[0]
    for i in range(size):
        top = max(top, logits[i])
    sums = np.empty((size + _RUN - 1) // _RUN, np.float64)
    total = 0.0
    for run in range(sums.shape[0]):
        weights = np.float32(0.0)
        for i in range(run * _RUN, min((run + 1) * _RUN, size)):
            weights += _weight((logits[i] - top) * factor)
        sums[run] = weights
        total += sums[run]
    left: float = noise * total
    run = 0
    while run < sums.shape[0] - 1 and left >= sums[run]:
        left -= sums[run]
        run += 1
    last = run * _RUN
    for i in range(run * _RUN, min((run + 1) * _RUN, size)):
        weight = _weight((logits[i] - top) * factor)
        if weight > _NOTHING:
            last = i
            if left < weight:
                return i
            left -= float(weight)
    return last
