"""What a chunk of a prompt costs, so that chunks can be cut to take equal time however long the prompt before them is.

Prefilling the first L tokens of a prompt takes T(L) = a L^2 + b L + c: every token goes through the linear layers and attends to
all tokens up to itself. The chunk x after a prefix p that takes as long as the first x0 tokens solves T(p + x) - T(p) =
T(x0) - T(0). Only the ratio 2 a / b matters for that, so work is counted in tokens of linear layers. (SGLang's dynamic chunking
fits such a parabola once, at start; here the model's arithmetic is the first guess, and steps correct it as they come back.)

Knows numbers only: no requests, no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_KEPT = 0.99  # weight of all steps before, with each new one: half of it is gone after 69
_TRUST = 0.2  # steps of average size that the first guess weighs
_FARTHEST = 8.0  # what is measured may differ by this factor from the first guess; beyond that, something else was measured


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """`pair`: what it costs that one token attends to another, in linear layers' tokens; 0: as if attention were free."""

    pair: float = 0.0

    def work(self, start: int, num_new: int) -> float:
        """Of the `num_new` tokens after the first `start` of a prompt; never less than `num_new`."""
        return num_new + self.pair * num_pairs(start, num_new)

    def num_tokens(self, start: int, work: float) -> int:
        """How many tokens after the first `start` are at most so much work."""
        linear = 1.0 + self.pair * start
        tokens = 2.0 * work / (linear + math.sqrt(linear * linear + 2.0 * self.pair * work))
        return int(tokens + 1e-6)  # what `work` was computed from has to come out again


def num_pairs(start: int, num_new: int) -> float:
    """Of tokens that attend to each other when `num_new` tokens follow `start` others; a token and itself count half."""
    return num_new * (start + num_new / 2)


class StepCosts:
    """`chunk` is what chunks cost here: a first guess, corrected by `observe`.

    A step's seconds are fitted as c + (n + f * guess * pairs) * s by least squares with weights that fade, for c, s and f. The
    guess counts as a few steps of average size which say that f is 1; short prompts hardly tell, and so leave it at that.
    """

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._moments = np.zeros((3, 3))  # of (1, tokens, guessed work of attention)
        self._seconds = np.zeros(3)  # the same, times seconds
        self.chunk = ChunkCost(guess)

    def observe(self, num_tokens: int, pairs: float, seconds: float) -> None:
        """A prefill step of so many tokens, and pairs of `num_pairs`, took so long."""
        if num_tokens < 1 or seconds <= 0 or not self._guess:
            return
        step = np.array([1.0, num_tokens, self._guess * pairs])
        self._moments = _KEPT * self._moments + np.outer(step, step)
        self._seconds = _KEPT * self._seconds + step * seconds
        self.chunk = ChunkCost(self._guess * self._fitted())

    def _fitted(self) -> float:
        """The factor on the guess."""
        count, square = self._moments[0, 0], self._moments[1, 1]
        alike = np.array([0.0, 1.0, -1.0])
        moments = self._moments + _TRUST * square / count * np.outer(alike, alike)
        # Where every step takes as long, as it should, nothing tells what one without tokens takes: then that is little.
        moments[0, 0] *= 1.01
        step_s, token_s, attention_s = np.linalg.solve(moments, self._seconds)
        if step_s < 0:
            token_s, attention_s = np.linalg.solve(moments[1:, 1:], self._seconds[1:])
        if token_s <= 0:
            return _FARTHEST
        return float(min(max(attention_s / token_s, 1 / _FARTHEST), _FARTHEST))
