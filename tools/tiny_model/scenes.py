"""Scenes: one to three coloured shapes, each in its own quarter of a light picture.

A scene is sizeless: positions are fractions of width and height, radii are fractions of the shorter side, so the same scene
can be drawn at any size. What a scene says about itself (colours, kinds, places) is true of every drawing of it.
Knows nothing of questions, tokens or models.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (230, 30, 30),
    "orange": (250, 140, 10),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "cyan": (20, 205, 220),
    "blue": (30, 60, 225),
    "purple": (145, 40, 180),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # reading order
MAX_SHAPES = 3

_COLOUR_JITTER = 25  # grey levels a channel may move; palette colours stay apart
_NUM_SHAPES_WEIGHTS = (3, 4, 5)  # three shapes are the hard case, so they come oftenest
_HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. `x`, `y`: its centre as fractions of width and height; `radius`: a fraction of the shorter side."""

    colour: str
    kind: str
    place: str
    x: float
    y: float
    radius: float
    fill: Rgb


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes in reading order of their places, over one background colour."""

    shapes: tuple[Shape, ...]
    background: Rgb

    @property
    def key(self) -> str:
        """What the scene shows, without exact positions and shades."""
        return "; ".join(f"{s.colour} {s.kind} {s.place}" for s in self.shapes)

    @property
    def held_out(self) -> bool:
        """True if no scene with these contents may be trained on; one key in ten is."""
        return zlib.crc32(self.key.encode()) % _HELD_OUT_EVERY == 0

    def at(self, place: str) -> Shape | None:
        """The shape at `place`, if any."""
        return next((s for s in self.shapes if s.place == place), None)


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draws from one side of the split: scenes of the two sides never show the same contents."""
    while True:
        scene = _any_scene(rng)
        if scene.held_out == held_out:
            return scene


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an RGB picture of width x height pixels."""
    picture = Image.new("RGB", (width, height), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _paint(pen, shape, width, height, shape.fill)
    return picture


def cover_map(scene: Scene, width: int, height: int) -> NDArray[np.uint8]:
    """[height, width]: 0 where background shows, i + 1 where shape i does."""
    picture = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(picture)
    for number, shape in enumerate(scene.shapes, start=1):
        _paint(pen, shape, width, height, number)
    return np.asarray(picture)


def _any_scene(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), weights=_NUM_SHAPES_WEIGHTS)[0]
    places = sorted(rng.sample(range(len(PLACES)), count))
    grey = rng.randint(212, 255)
    background = (_jitter(rng, grey, 6), _jitter(rng, grey, 6), _jitter(rng, grey, 6))
    return Scene(tuple(_any_shape(rng, place) for place in places), background)


def _any_shape(rng: random.Random, place: int) -> Shape:
    colour = rng.choice(tuple(COLOURS))
    red, green, blue = COLOURS[colour]
    radius = rng.uniform(0.125, 0.215)
    # The whole shape stays inside its quarter, whatever the picture's aspect: radii are of the shorter side.
    slack = 0.25 - radius - 0.01
    row, column = divmod(place, 2)
    return Shape(
        colour=colour,
        kind=rng.choice(KINDS),
        place=PLACES[place],
        x=0.25 + 0.5 * column + rng.uniform(-slack, slack),
        y=0.25 + 0.5 * row + rng.uniform(-slack, slack),
        radius=radius,
        fill=(
            _jitter(rng, red, _COLOUR_JITTER),
            _jitter(rng, green, _COLOUR_JITTER),
            _jitter(rng, blue, _COLOUR_JITTER),
        ),
    )


def _jitter(rng: random.Random, level: int, amount: int) -> int:
    return min(255, max(0, level + rng.randint(-amount, amount)))


def _paint(pen: ImageDraw.ImageDraw, shape: Shape, width: int, height: int, fill: Rgb | int) -> None:
    x, y, r = shape.x * width, shape.y * height, shape.radius * min(width, height)
    match shape.kind:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            side = 0.88 * r  # about the circle's area, so that size tells nothing of the kind
            pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
        case "triangle":
            pen.polygon(((x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)), fill=fill)
        case "cross":
            arm = 0.32 * r
            pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        case unknown:
            raise ValueError(f"no such kind of shape: {unknown!r}")
