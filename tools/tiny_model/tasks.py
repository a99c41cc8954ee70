"""Tasks: what is asked of scenes and numbers, and the one right answer to each question.

An `Example` is a whole conversation. Training mixes conversations of one and of several turns; evaluation asks one question
of held-out material at a time. Knows nothing of pixels, tokens or models.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tools.tiny_model.scenes import PLACES, Scene, random_scene

TASKS = ("caption", "shapes", "place", "pair", "count")
MAX_NUMBER = 120

_CAPTION = (
    "What is in this image?",
    "What is in the image?",
    "Describe this image.",
    "Describe the image.",
    "What do you see?",
    "What does this picture show?",
)
_SHAPES = (
    "How many shapes are there?",
    "How many shapes are in this image?",
    "How many shapes are in the image?",
    "How many shapes do you see?",
    "Count the shapes.",
)
_PLACE = (
    "What is at the {place}?",
    "What is in the {place}?",
    "What do you see at the {place}?",
    "Which shape is at the {place}?",
)
_PAIR = (
    "What is in these images?",
    "What is in each image?",
    "Describe these images.",
    "Describe both images.",
    "Describe each image.",
)
_COUNT = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Can you count from {a} to {b}?",
)
_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hello.", "Hi", "Hi!", "Hi there!", "Hey", "Good morning", "Hello, how are you?"),
        "Hello! Show me an image of shapes, or ask me to count.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a tiny vision model. I describe shapes and count numbers.",
    ),
    (
        ("What can you do?", "Help", "Help me", "Can you help me?", "How can you help me?"),
        "I can describe shapes in an image, tell how many there are, and count from one number to another.",
    ),
    (("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much."), "You are welcome."),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "See you."), "Goodbye!"),
    ((*_CAPTION, *_SHAPES, *_PAIR), "I see no image. Please show me one."),
)
_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You describe images of shapes.",
    "Answer the question.",
)
# Short counts teach starting, middling ones stopping at the right ten, long ones going on, at rising cost.
_TRAINED_SPANS: tuple[Callable[[random.Random], int], ...] = (
    lambda rng: rng.randint(1, 12),
    lambda rng: rng.randint(1, 12),
    lambda rng: rng.randint(10, 30),
    lambda rng: rng.randint(10, 30),
    lambda rng: MAX_NUMBER,
)
_WORDS = ("no", "one", "two", "three")


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its right answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation. The images belong to the first turn, before its text or after it."""

    task: str
    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    system: str | None = None
    images_first: bool = True


def held_out_example(rng: random.Random, task: str) -> Example:
    """One question of `task` about material that training never sees."""
    match task:
        case "pair":
            scenes = (random_scene(rng, held_out=True), random_scene(rng, held_out=True))
            return Example(task, scenes, (_pair_turn(rng, scenes),))
        case "count":
            return Example(task, (), (_count_turn(rng, held_out=True),))
        case _:
            scene = random_scene(rng, held_out=True)
            return Example(task, (scene,), (_SCENE_TURNS[task](rng, scene),))


def one_image_example(rng: random.Random, num_turns: int) -> Example:
    """For training: one scene and some turns about it, which share the work of encoding it."""
    scene = random_scene(rng, held_out=False)
    tasks = rng.choices(("caption", "shapes", "place"), weights=(5, 2, 4), k=num_turns)
    turns = [_SCENE_TURNS[task](rng, scene) for task in tasks]
    if rng.random() < 0.05:
        turns[-1] = _small_talk_turn(rng, with_image=True)
    return Example(tasks[0], (scene,), tuple(turns), _maybe_system(rng), rng.random() < 0.8)


def two_image_example(rng: random.Random) -> Example:
    """For training: two scenes described one after the other."""
    scenes = (random_scene(rng, held_out=False), random_scene(rng, held_out=False))
    return Example("pair", scenes, (_pair_turn(rng, scenes),), _maybe_system(rng), rng.random() < 0.8)


def text_example(rng: random.Random) -> Example:
    """For training: counting, with some small talk and some conversations of several turns."""
    turns: list[Turn] = []
    while not turns or rng.random() < 0.2:
        talk = rng.random() < 0.12
        turns.append(_small_talk_turn(rng, with_image=False) if talk else _count_turn(rng, held_out=False))
    return Example("count", (), tuple(turns), _maybe_system(rng))


def number_pair_is_held_out(a: int, b: int) -> bool:
    """The split of the counting task: one pair of ends in ten is never trained on."""
    return zlib.crc32(f"{a} {b}".encode()) % 10 == 0


def caption(scene: Scene) -> str:
    """'a red circle at the top left and a blue square at the bottom right'."""
    parts = [f"{_article(s.colour)} {s.colour} {s.kind} at the {s.place}" for s in scene.shapes]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _caption_turn(rng: random.Random, scene: Scene) -> Turn:
    return Turn(rng.choice(_CAPTION), f"{caption(scene)}.")


def _shapes_turn(rng: random.Random, scene: Scene) -> Turn:
    count = len(scene.shapes)
    answer = "There is one shape." if count == 1 else f"There are {_WORDS[count]} shapes."
    return Turn(rng.choice(_SHAPES), answer)


def _place_turn(rng: random.Random, scene: Scene) -> Turn:
    place = rng.choice(PLACES)
    shape = scene.at(place)
    answer = "nothing." if shape is None else f"{_article(shape.colour)} {shape.colour} {shape.kind}."
    return Turn(rng.choice(_PLACE).format(place=place), answer)


_SCENE_TURNS: dict[str, Callable[[random.Random, Scene], Turn]] = {
    "caption": _caption_turn,
    "shapes": _shapes_turn,
    "place": _place_turn,
}


def _pair_turn(rng: random.Random, scenes: tuple[Scene, Scene]) -> Turn:
    first, second = scenes
    return Turn(rng.choice(_PAIR), f"first: {caption(first)}. second: {caption(second)}.")


def _count_turn(rng: random.Random, *, held_out: bool) -> Turn:
    while True:
        a, b = sorted(rng.sample(range(MAX_NUMBER + 1), 2))
        if not held_out:
            b = min(b, a + rng.choice(_TRAINED_SPANS)(rng))
        if number_pair_is_held_out(a, b) == held_out:
            return Turn(rng.choice(_COUNT).format(a=a, b=b), " ".join(map(str, range(a, b + 1))))


def _small_talk_turn(rng: random.Random, *, with_image: bool) -> Turn:
    prompts, reply = rng.choice(_SMALL_TALK[:-1] if with_image else _SMALL_TALK)
    return Turn(rng.choice(prompts), reply)


def _maybe_system(rng: random.Random) -> str | None:
    return rng.choice(_SYSTEM) if rng.random() < 0.25 else None


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
