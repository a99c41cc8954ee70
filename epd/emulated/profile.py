"""What a device needs for each kind of work, as a JSON file: measured on one, or computed, and it says which.

The cost of a step of the language model is that of its linear layers, a curve over the rows of the batch, plus attention, linear
in the pairs of tokens (prompt chunks) or in the tokens of context (single new tokens) that attend to each other. Encoding
likewise, over patches. See `epd.emulated.cost`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from epd.errors import BadConfig

Curve = tuple[tuple[float, float], ...]  # (amount, seconds), amounts rising; straight between the points and past the last


class TextCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one step of the language model."""

    rows: Curve  # over new tokens in the batch: linear layers, norms, launches, sampling
    pair_s: float  # per (new token, context token) pair of a chunk
    context_s: float  # per token of context of a sequence with one new token


class VisionCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one step of the vision tower, and of making patches out of an image file on the host."""

    patches: Curve  # over patches in the batch
    pair_s: float  # per pair of patches of one image
    preprocess: Curve  # over patches of one image


class CopyCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Moving blocks from another worker on the host into the own pool, checked."""

    latency_s: float
    bytes_per_s: float


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of which model: what blocks and weights weigh on the device."""

    name: str
    kv_token_bytes: int
    embedding_row_bytes: int
    weight_bytes: int  # of the language model
    vision_weight_bytes: int
    active_share: float = 1.0  # of the language model's weights: what takes part in one token, less than all where it has experts


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device running one model."""

    device: str
    provenance: Literal["measured", "roofline"]  # roofline: computed from data sheets, no device has shown it
    source: str  # where, when and how: for people
    memory_bytes: int
    model: Model
    text: TextCosts
    vision: VisionCosts
    copies: CopyCosts


SHIPPED = Path(__file__).parents[1] / "assets" / "profiles"


def load_profile(path: str | Path) -> Profile:
    """Read a profile file, or one of those that come along, by its name without ending.

    Raises:
        BadConfig: there is none, or it is not one.
    """
    if not Path(path).exists() and (named := SHIPPED / f"{path}.json").exists():
        path = named
    try:
        profile = msgspec.json.decode(Path(path).read_bytes(), type=Profile)
    except OSError as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise BadConfig(f"cannot read the device profile {path} ({error.strerror}); those that come along: {shipped}") from error
    except msgspec.MsgspecError as error:
        raise BadConfig(f"{path} is no device profile: {error}") from error
    for name, curve in (
        ("text.rows", profile.text.rows),
        ("vision.patches", profile.vision.patches),
        ("vision.preprocess", profile.vision.preprocess),
    ):
        _check_curve(f"{path}: {name}", curve)
    numbers = (profile.text.pair_s, profile.text.context_s, profile.vision.pair_s, profile.copies.latency_s)
    if not 0 < profile.model.active_share <= 1:
        raise BadConfig(f"{path}: model.active_share is a share of the weights, not {profile.model.active_share}")
    if min(numbers) < 0 or profile.copies.bytes_per_s <= 0 or profile.memory_bytes <= 0:
        raise BadConfig(f"{path}: times cannot be negative, and bandwidth and memory are more than nothing")
    return profile


def slowed(profile: Profile, factor: float) -> Profile:
    """A device on which everything takes `factor` times as long: what a host can carry whose steps would come too fast."""

    def curve(points: Curve) -> Curve:
        return tuple((amount, seconds * factor) for amount, seconds in points)

    text, vision, copies = profile.text, profile.vision, profile.copies
    return msgspec.structs.replace(
        profile,
        source=f"{profile.source}; slowed down {factor:g} times",
        text=TextCosts(curve(text.rows), text.pair_s * factor, text.context_s * factor),
        vision=VisionCosts(curve(vision.patches), vision.pair_s * factor, curve(vision.preprocess)),
        copies=CopyCosts(copies.latency_s * factor, copies.bytes_per_s / factor),
    )


def _check_curve(name: str, curve: Curve) -> None:
    amounts = [amount for amount, _ in curve]
    if len(curve) < 2 or any(after <= before for before, after in pairwise(amounts)):
        raise BadConfig(f"{name} needs at least two points with rising amounts")
    if min(seconds for _, seconds in curve) < 0 or curve[-1][1] < curve[-2][1]:
        raise BadConfig(f"{name} cannot fall below zero, nor fall at its end")
