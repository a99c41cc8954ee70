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

_SLACK = 1.25  # prompts of usual length are cut by tokens alone: one step more costs them more than it saves others
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

    def budget(self, num_tokens: int) -> float:
        """What a step may be for which so many tokens were given: as many at the beginning of a prompt, and a quarter."""
        return _SLACK * self.work(0, num_tokens)

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

    A step's seconds are fitted as s * (tokens + f * guess * pairs) by least squares with weights that fade, for s and f. What a
    step takes whatever is in it is left out: steps are long beside it, and where they are all alike nothing tells it from s. The
    guess counts as part of a step of average size which says that f is 1: short prompts, whose pairs are few, hardly move it.
    """

    def __init__(self, guess: float) -> None:
        self._guess = guess
        # Weighted sums of products: of tokens, of the attention guessed for them, and of seconds.
        self._weight = self._tokens2 = self._both = self._attention2 = self._tokens_s = self._attention_s = 0.0
        self.chunk = ChunkCost(guess)

    def observe(self, num_tokens: int, pairs: float, seconds: float) -> None:
        """A prefill step of so many tokens, and pairs of `num_pairs`, took so long."""
        if num_tokens < 1 or seconds <= 0 or not self._guess:
            return
        attention = self._guess * pairs
        self._weight = _KEPT * self._weight + 1.0
        self._tokens2 = _KEPT * self._tokens2 + num_tokens * num_tokens
        self._both = _KEPT * self._both + num_tokens * attention
        self._attention2 = _KEPT * self._attention2 + attention * attention
        self._tokens_s = _KEPT * self._tokens_s + num_tokens * seconds
        self._attention_s = _KEPT * self._attention_s + attention * seconds
        self.chunk = ChunkCost(self._guess * self._fitted())

    def _fitted(self) -> float:
        """The factor on the guess, from the normal equations of the fit."""
        trust = _TRUST * self._tokens2 / self._weight
        tokens2, both, attention2 = self._tokens2 + trust, self._both - trust, self._attention2 + trust
        token_s = attention2 * self._tokens_s - both * self._attention_s  # both times the determinant, which is above zero
        attention_s = tokens2 * self._attention_s - both * self._tokens_s
        if token_s <= 0:
            return _FARTHEST
        return min(max(attention_s / token_s, 1 / _FARTHEST), _FARTHEST)
