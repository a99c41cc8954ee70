"""What is asked: prompts and images, drawn offline and reproducible. Pure: request i is a function of (spec, i).

Owns the shape of the load (share of image requests, images per request, sizes, how often an image or a prefix comes back) and the
bodies of the requests. Knows nothing of time, of HTTP or of what the server makes of it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# fmt: off
_WORDS = (
    "the", "a", "one", "each", "this", "that", "red", "green", "blue", "small", "large", "old", "new", "quick", "slow", "bright",
    "dark", "river", "mountain", "window", "garden", "letter", "engine", "paper", "number", "story", "market", "winter", "summer",
    "teacher", "doctor", "child", "friend", "city", "street", "music", "light", "water", "stone", "table", "house", "road",
    "bird", "finds", "makes", "takes", "gives", "sees", "holds", "turns", "opens", "moves", "follows", "over", "under", "near",
    "behind", "after", "before", "with", "without", "because", "while",
)
# fmt: on
_COLOURS = ((220, 40, 40), (40, 160, 60), (40, 80, 220), (240, 200, 40), (150, 60, 180), (240, 130, 40), (30, 30, 30))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file: a question, its images as data URLs, and the answer that is the only right one (None: any)."""

    text: str
    images: tuple[str, ...] = ()
    expect: str | None = None


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """The mix. Ranges are inclusive (low, high) and drawn from uniformly."""

    model: str = ""
    seed: int = 0
    image_share: float = 0.0  # of the requests
    images_per_request: tuple[int, int] = (1, 1)
    image_sizes: tuple[tuple[int, int], ...] = ((64, 64),)  # (width, height), one drawn per image
    image_repeat_share: float = 0.0  # of the images: taken from a small set that comes back, so that an encoder cache can hit
    num_repeated_images: int = 8
    image_format: str = "png"
    image_prompt: str = "What is in this image?"
    prompt_words: tuple[int, int] = (16, 64)  # of a text request
    prefix_words: int = 0  # at the start of every text request, always the same, so that a prefix cache can hit
    max_tokens: tuple[int, int] = (32, 32)
    ignore_eos: bool = False
    expect_length: bool = False  # an answer of another length than max_tokens is a failure; implied by ignore_eos
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()  # asked in turn instead of drawn ones


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request, ready to send."""

    index: int
    body: bytes
    num_images: int = 0
    expect_text: str | None = None
    expect_tokens: int | None = None  # any other length is a failure


def draw_request(spec: WorkloadSpec, index: int) -> LoadRequest:
    """Request number `index` of the load; equal on every call."""
    rng = np.random.default_rng((spec.seed, 0xB2, index))
    prompt = spec.prompts[index % len(spec.prompts)] if spec.prompts else _draw_prompt(spec, rng)
    max_tokens = _between(rng, spec.max_tokens)
    body: dict[str, Any] = {
        "model": spec.model,
        "messages": [{"role": "user", "content": _content(prompt)}],
        "max_tokens": max_tokens,
        "temperature": spec.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if spec.ignore_eos:
        body["ignore_eos"] = True
    body |= spec.extra_body
    return LoadRequest(
        index=index,
        body=json.dumps(body).encode(),
        num_images=len(prompt.images),
        expect_text=prompt.expect,
        expect_tokens=max_tokens if spec.ignore_eos or spec.expect_length else None,
    )


def draw_image(size: tuple[int, int], rng: np.random.Generator, image_format: str = "png") -> bytes:
    """An image file of `size` (width, height): a few coloured shapes on a plain ground."""
    width, height = size
    ground, *colours = (_COLOURS[i] for i in rng.permutation(len(_COLOURS)))
    image = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(image)
    for colour in colours[: int(rng.integers(1, 4))]:
        left, top = int(rng.integers(0, max(1, width // 2))), int(rng.integers(0, max(1, height // 2)))
        box = (left, top, left + max(2, int(rng.integers(width // 4, width // 2 + 1))), top + max(2, height // 3))
        (pen.ellipse if rng.integers(2) else pen.rectangle)(box, fill=colour)
    # One pixel of noise per image: two drawn images are never equal by chance, so that a cache hits only where it is meant to.
    image.putpixel((int(rng.integers(width)), int(rng.integers(height))), tuple(int(v) for v in rng.integers(0, 256, 3)))
    file = io.BytesIO()
    image.save(file, format=image_format, **({"compress_level": 1} if image_format == "png" else {}))
    return file.getvalue()


def read_prompts(lines: Sequence[str]) -> tuple[Prompt, ...]:
    """Prompts from JSON lines: {"prompt": str, "images": [data URL, ...]?, "expect": str?}.

    Raises:
        ValueError: a line is not such an object; the message names it.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompts.append(Prompt(text=str(entry["prompt"]), images=tuple(entry.get("images", ())), expect=entry.get("expect")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not a prompt: {error!r}") from error
    if not prompts:
        raise ValueError("there is no prompt in it")
    return tuple(prompts)


def _draw_prompt(spec: WorkloadSpec, rng: np.random.Generator) -> Prompt:
    if rng.random() >= spec.image_share:
        prefix = _words(np.random.default_rng((spec.seed, 0xC3)), spec.prefix_words)
        return Prompt(text=" ".join(prefix + _words(rng, _between(rng, spec.prompt_words))))
    images = tuple(_draw_data_url(spec, rng) for _ in range(_between(rng, spec.images_per_request)))
    return Prompt(text=spec.image_prompt, images=images)


def _draw_data_url(spec: WorkloadSpec, rng: np.random.Generator) -> str:
    if rng.random() < spec.image_repeat_share:
        rng = np.random.default_rng((spec.seed, 0xD4, int(rng.integers(spec.num_repeated_images))))
    size = spec.image_sizes[int(rng.integers(len(spec.image_sizes)))]
    data = draw_image(size, rng, spec.image_format)
    return f"data:image/{spec.image_format};base64,{base64.b64encode(data).decode()}"


def _content(prompt: Prompt) -> str | list[dict[str, Any]]:
    if not prompt.images:
        return prompt.text
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in prompt.images]
    return [*parts, {"type": "text", "text": prompt.text}]


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [_WORDS[i] for i in rng.integers(0, len(_WORDS), count)]


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))
