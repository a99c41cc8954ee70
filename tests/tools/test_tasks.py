"""Tasks: answers are right by construction, and held-out questions are about held-out material."""

from __future__ import annotations

import random
import re

import pytest

from tools.tiny_model.scenes import PLACES, Scene
from tools.tiny_model.tasks import (
    MAX_NUMBER,
    TASKS,
    Example,
    caption,
    held_out_example,
    number_pair_is_held_out,
    one_image_example,
    text_example,
    two_image_example,
)

NUMBERS = {"is one": 1, "are two": 2, "are three": 3}


def held_out(task: str, count: int = 200) -> list[Example]:
    rng = random.Random(3)
    return [held_out_example(rng, task) for _ in range(count)]


def described(text: str) -> list[tuple[str, str, str]]:
    """(colour, kind, place) of each shape that a caption speaks of."""
    return re.findall(r"an? (\w+) (\w+) at the (\w+ \w+)", text)


def contents(scene: Scene) -> list[tuple[str, str, str]]:
    return [(shape.colour, shape.kind, shape.place) for shape in scene.shapes]


def test_captions_name_every_shape_in_reading_order() -> None:
    for example in held_out("caption"):
        (turn,) = example.turns
        assert described(turn.answer) == contents(example.scenes[0])
        assert turn.answer.endswith(".")


def test_the_number_of_shapes_is_right() -> None:
    for example in held_out("shapes"):
        words = re.match(r"There (\w+ \w+) shapes?\.$", example.turns[0].answer)
        assert words
        assert NUMBERS[words[1]] == len(example.scenes[0].shapes)


def test_places_hold_what_the_answer_says_or_nothing() -> None:
    answers = set()
    for example in held_out("place"):
        (turn,) = example.turns
        place = next(place for place in PLACES if place in turn.question)
        shape = example.scenes[0].at(place)
        article = "an" if shape and shape.colour == "orange" else "a"
        assert turn.answer == (f"{article} {shape.colour} {shape.kind}." if shape else "nothing.")
        answers.add(turn.answer == "nothing.")
    assert answers == {True, False}


def test_two_images_are_described_one_after_the_other() -> None:
    for example in held_out("pair"):
        first, second = example.scenes
        assert example.turns[0].answer == f"first: {caption(first)}. second: {caption(second)}."


def test_counts_go_from_the_first_number_to_the_second() -> None:
    for example in held_out("count"):
        (turn,) = example.turns
        a, b = map(int, re.findall(r"\d+", turn.question))
        assert [int(number) for number in turn.answer.split(" ")] == list(range(a, b + 1))
        assert 0 <= a < b <= MAX_NUMBER


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_about_held_out_material(task: str) -> None:
    for example in held_out(task, 50):
        assert example.task == task
        assert all(scene.held_out for scene in example.scenes)
        if task == "count":
            a, b = map(int, re.findall(r"\d+", example.turns[0].question))
            assert number_pair_is_held_out(a, b)


def test_training_never_sees_held_out_material() -> None:
    rng = random.Random(5)
    for _ in range(300):
        examples = (one_image_example(rng, num_turns=2), two_image_example(rng), text_example(rng))
        assert not any(scene.held_out for example in examples for scene in example.scenes)
        for turn in examples[2].turns:
            ends = re.findall(r"\d+", turn.question)
            assert not ends or not number_pair_is_held_out(int(ends[0]), int(ends[1]))


def test_a_conversation_about_one_image_has_the_turns_asked_for() -> None:
    assert [len(one_image_example(random.Random(0), num).turns) for num in (1, 2, 3, 4)] == [1, 2, 3, 4]
