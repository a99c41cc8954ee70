"""Batches: conversations to padded arrays of tokens, positions, answer marks and pixels.

Step n's batches are a function of (seed, n), so a run that was cut off goes on with the same data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tools.tiny_model.pixels import CELL, OTHER_SIZES, PATCH, SQUARE, cell_labels, patchify, training_picture
from tools.tiny_model.tasks import (
    Example,
    held_out_example,
    one_image_example,
    text_example,
    two_image_example,
)
from tools.tiny_model.tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START

Positions = NDArray[np.int64]

_OTHER_SIZE_SHARE = 0.12
_TURNS = (1, 2, 3, 4)
_TEXT_POOL = 4  # steps whose text conversations are sorted by length together, so that little is padded


@dataclass(frozen=True, slots=True)
class Mix:
    """Conversations per optimiser step."""

    one_image: int = 20
    two_images: int = 6
    text: int = 16


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of one batch, in the order in which their tokens stand in it."""

    patches: Tensor  # [images, patches, PATCH_VALUES] float32
    grid: tuple[int, int]  # patch rows, patch columns
    colours: Tensor  # [images, merged patches] int64, see pixels.cell_labels
    kinds: Tensor  # same


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations of one kind, padded at the right."""

    tokens: Tensor  # [rows, length] int64
    positions: Tensor  # [3, rows, length] int64: time, height, width
    answers: Tensor  # [rows, length] bool: tokens that the model is to say
    image_tokens: Tensor  # [rows, length] bool
    count_ends: Tensor  # [rows, length] int64: at a counted number's last digit, the number to stop at; -1 elsewhere
    counts_left: Tensor  # [rows, length] int64: at the same places, how many numbers are still to come
    pictures: Pictures | None


@dataclass(frozen=True, slots=True)
class _Row:
    """One conversation; lists are per token."""

    tokens: list[int]
    answers: list[bool]
    positions: Positions  # [3, tokens]
    counts: list[tuple[int, int, int]]  # (token, number to stop at, numbers still to come)


class BatchMaker:
    """Makes the batches of each training step and of each held-out task."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, mix: Mix) -> None:
        self._seed = seed
        self._mix = mix
        self._encode = lru_cache(maxsize=4096)(lambda text: tokenizer.encode(text).ids)
        vocabulary = tokenizer.get_vocab()
        self._pad = vocabulary[END_OF_TEXT]
        self._image_pad = vocabulary[IMAGE_PAD]

    def training(self, step: int) -> list[Batch]:
        """The batches whose gradients make up one optimiser step."""
        rng = random.Random(f"train/{self._seed}/{step}")
        batches = []
        if self._mix.one_image:
            turns = rng.choice(_TURNS)  # the same for all rows: rows of like length need little padding
            examples = [one_image_example(rng, turns) for _ in range(self._mix.one_image)]
            batches.append(self._of_images(rng, examples))
        if self._mix.two_images:
            batches.append(self._of_images(rng, [two_image_example(rng) for _ in range(self._mix.two_images)]))
        if self._mix.text:
            batches.append(self._of_text(step))
        return batches

    def held_out(self, task: str, count: int) -> Batch:
        """`count` single questions of `task`; the same ones each time."""
        rng = random.Random(f"held-out/{self._seed}/{task}")
        return self._batch([held_out_example(rng, task) for _ in range(count)], SQUARE, rng)

    def _of_images(self, rng: random.Random, examples: list[Example]) -> Batch:
        size = rng.choice(OTHER_SIZES) if rng.random() < _OTHER_SIZE_SHARE else SQUARE
        return self._batch(examples, size, rng)

    def _of_text(self, step: int) -> Batch:
        pool, turn = divmod(step, _TEXT_POOL)
        rng = random.Random(f"text/{self._seed}/{pool}")
        examples = [text_example(rng) for _ in range(self._mix.text * _TEXT_POOL)]
        examples.sort(key=lambda e: sum(len(t.answer) + 40 for t in e.turns))
        return self._batch(examples[turn * self._mix.text : (turn + 1) * self._mix.text], SQUARE, rng)

    def _batch(self, examples: list[Example], size: tuple[int, int], rng: random.Random) -> Batch:
        rows = [self._row(example, size) for example in examples]
        shape = (len(rows), max(len(row.tokens) for row in rows))
        tokens = np.full(shape, self._pad, dtype=np.int64)
        answers = np.zeros(shape, dtype=bool)
        positions = np.zeros((3, *shape), dtype=np.int64)
        count_ends = np.full(shape, -1, dtype=np.int64)
        counts_left = np.full(shape, -1, dtype=np.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            answers[i, : len(row.tokens)] = row.answers
            positions[:, i, : len(row.tokens)] = row.positions
            for at, end, left in row.counts:
                count_ends[i, at], counts_left[i, at] = end, left
        scenes = [scene for example in examples for scene in example.scenes]
        pictures = None
        if scenes:
            labels = [cell_labels(scene, size) for scene in scenes]
            pictures = Pictures(
                patches=torch.from_numpy(patchify(np.stack([training_picture(rng, s, size) for s in scenes]))),
                grid=(size[1] // PATCH, size[0] // PATCH),
                colours=torch.from_numpy(np.stack([colours for colours, _ in labels])),
                kinds=torch.from_numpy(np.stack([kinds for _, kinds in labels])),
            )
        return Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            answers=torch.from_numpy(answers),
            image_tokens=torch.from_numpy(tokens == self._image_pad),
            count_ends=torch.from_numpy(count_ends),
            counts_left=torch.from_numpy(counts_left),
            pictures=pictures,
        )

    def _row(self, example: Example, size: tuple[int, int]) -> _Row:
        """The conversation as the chat template writes it."""
        tokens: list[int] = []
        answers: list[bool] = []
        counts: list[tuple[int, int, int]] = []
        for text, is_answer in self._pieces(example, size):
            if is_answer and text[0].isdigit():
                counts += count_marks(text.removesuffix(IM_END), len(tokens))
            piece = self._encode(text)
            tokens += piece
            answers += [is_answer] * len(piece)
        cells = (size[1] // CELL, size[0] // CELL)
        return _Row(tokens, answers, mrope_positions(tokens, self._image_pad, cells), counts)

    def _pieces(self, example: Example, size: tuple[int, int]) -> list[tuple[str, bool]]:
        num_cells = (size[0] // CELL) * (size[1] // CELL)
        images = f"{VISION_START}{IMAGE_PAD * num_cells}{VISION_END}" * len(example.scenes)
        pieces = []
        if example.system is not None:
            pieces.append((f"{IM_START}system\n{example.system}{IM_END}\n", False))
        for i, turn in enumerate(example.turns):
            before = images if i == 0 and example.images_first else ""
            after = images if i == 0 and not example.images_first else ""
            asked = f"{IM_START}user\n{before}{turn.question}{after}{IM_END}\n{IM_START}assistant\n"
            pieces += [(asked, False), (f"{turn.answer}{IM_END}", True), ("\n", False)]
        return pieces[:-1]


def count_marks(answer: str, start: int) -> list[tuple[int, int, int]]:
    """(last token, number to stop at, numbers still to come) of each number in an answer that begins at token `start`.

    Digits and blanks are one token each.
    """
    numbers = answer.split(" ")
    marks = []
    for i, number in enumerate(numbers, start=1):
        marks.append((start + len(number) - 1, int(numbers[-1]), len(numbers) - i))
        start += len(number) + 1
    return marks


def mrope_positions(tokens: list[int], image_pad: int, cells: tuple[int, int]) -> Positions:
    """[3, tokens]: text moves all three positions by one; an image at p spans p + row and p + column of its cells."""
    rows, columns = cells
    positions = np.empty((3, len(tokens)), dtype=np.int64)
    at = i = 0
    while i < len(tokens):
        if tokens[i] != image_pad:
            positions[:, i] = at
            at, i = at + 1, i + 1
            continue
        end = i + rows * columns
        positions[0, i:end] = at
        positions[1, i:end] = at + np.repeat(np.arange(rows), columns)
        positions[2, i:end] = at + np.tile(np.arange(columns), rows)
        at, i = at + max(rows, columns), end
    return positions
