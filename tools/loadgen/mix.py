"""The classes of requests that a load is mixed of: text, or images of some number and size. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_RESOLUTIONS = {
    "240p": (426, 240),
    "360p": (640, 360),
    "480p": (854, 480),
    "720p": (1280, 720),
    "1080p": (1920, 1080),
    "1440p": (2560, 1440),
    "4k": (3840, 2160),
}
_MAX_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class MixClass:
    """Requests of one kind; `weight` is relative to the other classes'."""

    name: str
    weight: float
    num_images: int = 0
    size: tuple[int, int] = (0, 0)  # width, height in pixels


TEXT_ONLY = (MixClass("text", 1.0),)


def parse_mix(text: str) -> tuple[MixClass, ...]:
    """Read "text:50,1x1080p:30,4x640x480:20": per class how many images of which size, and its weight (1 if not given).

    Raises:
        ValueError: it is no such list; the message names the part.
    """
    classes = tuple(_parse_class(part.strip()) for part in text.split(","))
    names = [each.name for each in classes]
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r} names a class twice")
    if not sum(each.weight for each in classes):
        raise ValueError(f"{text!r}: no class has a weight")
    return classes


def pick(classes: Sequence[MixClass], draw: float) -> MixClass:
    """The class at `draw`, which is in [0, 1): each takes a share of that range like its weight."""
    at = draw * sum(each.weight for each in classes)
    for each in classes:
        at -= each.weight
        if at < 0:
            return each
    return next(each for each in reversed(classes) if each.weight)  # a sum that rounding made too short


def _parse_class(part: str) -> MixClass:
    name, colon, weight_text = part.partition(":")
    try:
        weight = float(weight_text) if colon else 1.0
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{part!r}: {weight_text!r} is no weight")
    if name == "text":
        return MixClass(name, weight)
    match = re.fullmatch(r"(\d+)x(?:(\w+p|4k)|(\d+)x(\d+))", name)
    size = _RESOLUTIONS.get(match[2], (0, 0)) if match and match[2] else (int(match[3]), int(match[4])) if match else (0, 0)
    if not match or not 1 <= int(match[1]) <= _MAX_IMAGES or not (2 <= size[0] <= 16384 and 2 <= size[1] <= 16384):
        raise ValueError(f"{name!r} is neither text nor images like 1x1080p or 4x640x480 (known: {', '.join(_RESOLUTIONS)})")
    return MixClass(name, weight, int(match[1]), size)
