"""Pixels: pictures to patch vectors, as Qwen2VLImageProcessorPil makes them, and what each merged patch shows.

One grid (patch rows x columns) holds for a whole batch, so patches stack into one array.
"""

from __future__ import annotations

import io
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.tiny_model.scenes import COLOURS, KINDS, Scene, cover_map, draw

PATCH = 8
MERGE = 2
TEMPORAL_PATCH = 2
CELL = PATCH * MERGE  # pixels per side of what one image token covers
MIN_PIXELS = 3072
MAX_PIXELS = 4096
PATCH_VALUES = 3 * TEMPORAL_PATCH * PATCH * PATCH

SQUARE = (64, 64)
# Sizes (width, height) that smart resizing gives to pictures that are not square.
OTHER_SIZES = ((64, 48), (48, 64), (80, 48), (48, 80))

IGNORED = -100  # a cell that shows too little of a shape to say which

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


def patchify(pictures: NDArray[np.uint8]) -> Floats:
    """[n, height, width, 3] grey levels -> [n, patches, 3 * 2 * 8 * 8], each value in -1..1.

    Patches go merge block by merge block (block row, block column, row and column in the block); a patch's values go
    channel, time, row, column, and a still picture fills both times.
    """
    n, height, width, _ = pictures.shape
    scaled = pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)
    blocks = scaled.reshape(n, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    patches = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # [n, block row, block col, row, col, channel, y, x]
    still = np.broadcast_to(patches[..., None, :, :], (*patches.shape[:6], TEMPORAL_PATCH, PATCH, PATCH))
    return np.ascontiguousarray(still).reshape(n, -1, PATCH_VALUES)


def training_picture(rng: random.Random, scene: Scene, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[height, width, 3]: the scene as a client may send it: drawn larger, as a JPEG, or with some noise."""
    width, height = size
    scale = rng.choice((1, 1, 1, 1.25, 2, 4))
    picture = draw(scene, round(width * scale), round(height * scale))
    if rng.random() < 0.2:
        picture = as_jpeg(picture, quality=rng.randint(70, 95))
    if scale != 1:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    levels = np.asarray(picture)
    if rng.random() < 0.15:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 6), levels.shape)
        levels = np.clip(np.rint(levels + noise), 0, 255).astype(np.uint8)
    return levels


def as_jpeg(picture: Image.Image, *, quality: int) -> Image.Image:
    """The picture after a JPEG round trip."""
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=quality)
    return Image.open(packed)


def cell_labels(scene: Scene, size: tuple[int, int]) -> tuple[Labels, Labels]:
    """Per merged patch, row by row: which colour and which kind it shows, counted from 1; 0 is background.

    A cell belongs to the shape that covers a tenth of it or more; one that shows less is background only if it shows
    nothing at all, else IGNORED.
    """
    width, height = size
    cover = cover_map(scene, width, height)
    blocks = cover.reshape(height // CELL, CELL, width // CELL, CELL).transpose(0, 2, 1, 3).reshape(-1, CELL * CELL)
    colours = np.zeros(len(blocks), dtype=np.int64)
    kinds = np.zeros(len(blocks), dtype=np.int64)
    for cell, block in enumerate(blocks):
        shares = np.bincount(block, minlength=len(scene.shapes) + 1)[1:]
        best = int(shares.argmax())
        if shares[best] >= CELL * CELL // 10:
            colours[cell] = 1 + list(COLOURS).index(scene.shapes[best].colour)
            kinds[cell] = 1 + KINDS.index(scene.shapes[best].kind)
        elif shares[best]:
            colours[cell] = kinds[cell] = IGNORED
    return colours, kinds
