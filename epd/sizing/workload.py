"""What is asked of a cluster, as far as its size depends on it: kinds of requests, by share. Pure.

`parse_workload` reads the notation of the command line; image sizes become patches as the model's preprocessing would make them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from epd.errors import BadConfig
from epd.model.config import ImageConfig
from epd.model.preprocess import smart_resize

RESOLUTIONS = {"480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080), "1440p": (2560, 1440), "4k": (3840, 2160)}
_TEMPLATE_TOKENS = 10  # of a chat template round a message


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind. `patches`: of each image; `text_tokens` without what images become."""

    text_tokens: int
    output_tokens: int
    patches: tuple[int, ...] = ()
    merge: int = 4  # patches that become one token
    weight: float = 1.0

    @property
    def image_tokens(self) -> tuple[int, ...]:
        return tuple(count // self.merge for count in self.patches)

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + sum(self.image_tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    kinds: tuple[Kind, ...]

    def shares(self) -> Sequence[tuple[float, Kind]]:
        """Each kind's share of the requests; they sum to 1."""
        total = sum(kind.weight for kind in self.kinds)
        return [(kind.weight / total, kind) for kind in self.kinds]


def parse_workload(text: str, image: ImageConfig) -> Workload:
    """Read "text=1000,output=64,weight=3 + text=50,images=4x1080p,output=64": kinds with "+" between them.

    Raises:
        BadConfig: it is no such list; the message names the part.
    """
    return Workload(tuple(_kind(part.strip(), image) for part in text.split("+")))


def num_patches(width: int, height: int, image: ImageConfig) -> int:
    factor = image.patch_size * image.merge_size
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=image.min_pixels, max_pixels=image.max_pixels)
    return (rows // image.patch_size) * (columns // image.patch_size)


def _kind(part: str, image: ImageConfig) -> Kind:
    values = dict(item.strip().partition("=")[::2] for item in part.split(","))
    patches: tuple[int, ...] = ()
    try:
        if images := values.pop("images", ""):
            patches = _images(images, image)
        kind = Kind(
            text_tokens=int(values.pop("text", "50")) + _TEMPLATE_TOKENS + 2 * len(patches),
            output_tokens=int(values.pop("output", "64")),
            patches=patches,
            merge=image.merge_size**2,
            weight=float(values.pop("weight", "1")),
        )
    except ValueError as error:
        raise BadConfig(f"--workload {part!r}: {error}") from None
    if values or kind.text_tokens < 1 or kind.output_tokens < 1 or not 0 < kind.weight < float("inf"):
        raise BadConfig(f"--workload {part!r}: a kind is text=TOKENS,images=NxSIZE,output=TOKENS,weight=W, each above 0")
    return kind


def _images(text: str, image: ImageConfig) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d+)x(?:(\w+)|(\d+)x(\d+))", text)
    size = match and (RESOLUTIONS.get(match[2] or "") or (_explicit(match[2] or f"{match[3]}x{match[4]}")))
    if not match or not size:
        raise ValueError(f"{text!r} is not a number of images and their size, as in 4x1080p or 4x640x480")
    return (num_patches(*size, image),) * int(match[1])


def _explicit(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None
