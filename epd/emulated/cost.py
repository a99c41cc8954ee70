"""How long a step takes on a profiled device. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from epd.emulated.profile import Curve, Profile
from epd.step import StepPlan


@dataclass(frozen=True, slots=True)
class TextWork:
    """One step of the language model, as far as its cost goes. Two add up to one step with both batches in it."""

    num_rows: int = 0
    num_pairs: int = 0
    num_context: int = 0

    def __add__(self, other: TextWork) -> TextWork:
        return TextWork(self.num_rows + other.num_rows, self.num_pairs + other.num_pairs, self.num_context + other.num_context)


def text_work(sequences: Iterable[tuple[int, int]]) -> TextWork:
    """Of sequences with (new tokens, tokens computed before)."""
    rows = pairs = context = 0
    for num_new, num_before in sequences:
        rows += num_new
        if num_new == 1:
            context += num_before + 1
        else:
            pairs += num_new * num_before + num_new * (num_new + 1) // 2
    return TextWork(rows, pairs, context)


def work_of(plan: StepPlan) -> TextWork:
    return text_work((len(sequence.token_ids), sequence.num_computed_tokens) for sequence in plan.sequences)


def text_s(profile: Profile, work: TextWork) -> float:
    if not work.num_rows:
        return 0.0
    text = profile.text
    return at(text.rows, work.num_rows) + text.pair_s * work.num_pairs + text.context_s * work.num_context


def encode_s(profile: Profile, patches: Sequence[int]) -> float:
    """Of images with so many patches each, in one batch."""
    if not patches:
        return 0.0
    vision = profile.vision
    return at(vision.patches, sum(patches)) + vision.pair_s * sum(count * count for count in patches)


def preprocess_s(profile: Profile, num_patches: int) -> float:
    return at(profile.vision.preprocess, num_patches)


def at(curve: Curve, amount: float) -> float:
    """The curve's seconds for an amount: straight lines between points, as between the last two beyond them, never below zero."""
    place = min(max(bisect_right(curve, (amount, float("inf"))), 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return max(0.0, y0 + (y1 - y0) * (amount - x0) / (x1 - x0))
