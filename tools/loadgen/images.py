"""Images drawn offline: equal for equal numbers, different for different ones, and about as large as photographs.

A scene (texture and shapes) is drawn once per size and seed and kept; an image is a copy of one with a patch of noise of its own,
so that drawing costs little more than encoding, and no cache hits unless it is meant to.
"""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

_COLOURS = ((220, 40, 40), (40, 160, 60), (40, 80, 220), (240, 200, 40), (150, 60, 180), (240, 130, 40), (30, 30, 30))
_NUM_SCENES = 4  # per size
_PATCH = 16  # pixels; large enough to survive JPEG


def image_url(seed: int, number: int, size: tuple[int, int], image_format: str) -> str:
    """Image `number` of a load as a data URL. `size`: (width, height); `image_format`: "jpeg" or "png"."""
    data = draw_image(seed, number, size, image_format)
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"


def draw_image(seed: int, number: int, size: tuple[int, int], image_format: str) -> bytes:
    """The file of image `number`."""
    image = _scene(seed, number % _NUM_SCENES, size).copy()
    rng = np.random.default_rng((seed, 0xE5, number))
    width, height = size
    patch_size = (min(_PATCH, width), min(_PATCH, height))
    patch = Image.fromarray(rng.integers(0, 256, (patch_size[1], patch_size[0], 3), dtype=np.uint8), "RGB")
    image.paste(patch, (int(rng.integers(width - patch_size[0] + 1)), int(rng.integers(height - patch_size[1] + 1))))
    file = io.BytesIO()
    image.save(file, format=image_format, **({"compress_level": 1} if image_format == "png" else {"quality": 85}))
    return file.getvalue()


@lru_cache(maxsize=64)
def _scene(seed: int, number: int, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng((seed, 0xE6, number))
    width, height = size
    ground, *colours = (_COLOURS[i] for i in rng.permutation(len(_COLOURS)))
    texture = np.asarray(ground) + rng.normal(0, 25, (max(2, height // 8), max(2, width // 8), 3))
    image = Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8), "RGB").resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for colour in colours[: int(rng.integers(1, 4))]:
        left, top = int(rng.integers(0, max(1, width // 2))), int(rng.integers(0, max(1, height // 2)))
        box = (left, top, left + max(2, int(rng.integers(width // 4, width // 2 + 1))), top + max(2, height // 3))
        (pen.ellipse if rng.integers(2) else pen.rectangle)(box, fill=colour)
    return image
