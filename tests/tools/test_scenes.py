"""Scenes: what they say about themselves is what a look at the pixels finds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tools.tiny_model.scenes import COLOURS, KINDS, PLACES, Scene, Shape, cover_map, draw, random_scene

SIZES = [(64, 64), (128, 128), (80, 48)]


def scenes(count: int, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng, held_out=held_out) for _ in range(count)]


def colours_seen(scene: Scene, size: tuple[int, int]) -> dict[str, str]:
    """Place -> the palette colour nearest to the strongest paint in that quarter; empty quarters are left out."""
    width, height = size
    pixels = np.asarray(draw(scene, width, height)).astype(int)
    seen = {}
    for number, place in enumerate(PLACES):
        row, column = divmod(number, 2)
        quarter = pixels[row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2].reshape(
            -1, 3
        )
        painted = quarter[np.abs(quarter - scene.background).max(axis=1) > 30]
        if len(painted):
            middle = np.median(painted, axis=0)
            seen[place] = min(COLOURS, key=lambda colour: np.abs(middle - COLOURS[colour]).sum())
    return seen


def kind_seen(cover: np.ndarray) -> str:
    """The kind of one shape from its mask, by how it fills its bounding box."""
    rows, columns = np.nonzero(cover)
    box = cover[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] > 0
    corners = [box[0, 0], box[0, -1], box[-1, 0], box[-1, -1]]
    if all(corners):
        return "square"
    if box[-2].mean() > 0.8 and box[1].mean() < 0.5:
        return "triangle"
    return "cross" if box.mean() < 0.62 else "circle"


@pytest.mark.parametrize("size", SIZES)
def test_a_look_at_the_pixels_finds_the_colours_at_their_places(size: tuple[int, int]) -> None:
    for scene in scenes(200):
        assert colours_seen(scene, size) == {shape.place: shape.colour for shape in scene.shapes}


def test_a_look_at_the_pixels_finds_the_kinds() -> None:
    for scene in scenes(200):
        cover = cover_map(scene, 256, 256)
        for number, shape in enumerate(scene.shapes, start=1):
            assert kind_seen(cover == number) == shape.kind


@pytest.mark.parametrize("size", SIZES)
def test_shapes_stay_inside_their_quarters(size: tuple[int, int]) -> None:
    width, height = size
    for scene in scenes(200):
        cover = cover_map(scene, width, height)
        for number, shape in enumerate(scene.shapes, start=1):
            rows, columns = np.nonzero(cover == number)
            row, column = divmod(PLACES.index(shape.place), 2)
            assert row * height // 2 <= rows.min() <= rows.max() < (row + 1) * height // 2
            assert column * width // 2 <= columns.min() <= columns.max() < (column + 1) * width // 2


def test_the_same_seed_draws_the_same_pixels() -> None:
    first, second = ([draw(scene, 64, 64).tobytes() for scene in scenes(20)] for _ in range(2))
    assert first == second


def test_the_two_sides_of_the_split_share_no_contents() -> None:
    trained = {scene.key for scene in scenes(2000)}
    held_out = {scene.key for scene in scenes(500, held_out=True)}
    assert not trained & held_out


def test_shapes_stand_in_reading_order_at_different_places() -> None:
    for scene in scenes(200):
        places = [PLACES.index(shape.place) for shape in scene.shapes]
        assert places == sorted(set(places))
        assert 1 <= len(places) <= 3


def test_at_finds_a_shape_by_its_place() -> None:
    scene = scenes(1)[0]
    for place in PLACES:
        assert scene.at(place) == next((shape for shape in scene.shapes if shape.place == place), None)


def test_every_colour_and_kind_comes_up() -> None:
    drawn = [shape for scene in scenes(200) for shape in scene.shapes]
    assert {shape.colour for shape in drawn} == set(COLOURS)
    assert {shape.kind for shape in drawn} == set(KINDS)


def test_an_unknown_kind_is_refused() -> None:
    odd = Shape("red", "heptagon", "top left", 0.25, 0.25, 0.1, (255, 0, 0))
    with pytest.raises(ValueError, match="heptagon"):
        draw(Scene((odd,), (255, 255, 255)), 64, 64)
