"""Training's own forward pass and pixels are transformers' own, to rounding."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

from tools.tiny_model.batches import Batch, BatchMaker, Mix, count_marks
from tools.tiny_model.heads import Heads
from tools.tiny_model.network import forward, image_features
from tools.tiny_model.optimiser import orthogonal
from tools.tiny_model.pixels import IGNORED, MAX_PIXELS, MIN_PIXELS, cell_labels, patchify
from tools.tiny_model.scenes import COLOURS, KINDS, draw, random_scene
from tools.tiny_model.tokenizer import END_OF_TEXT, train_tokenizer
from tools.tiny_model.train import answer_loss, bundled_config


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(num_examples=100)


@cache
def model() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(bundled_config(tokenizer())).eval()


def maker() -> BatchMaker:
    return BatchMaker(tokenizer(), seed=0, mix=Mix(one_image=3, two_images=2, text=3))


def logits_by_transformers(batch: Batch) -> torch.Tensor:
    """What transformers predicts at the positions before the answer tokens."""
    inputs = {}
    if batch.pictures is not None:
        grid = torch.tensor([[1, *batch.pictures.grid]] * len(batch.pictures.patches))
        inputs = {"pixel_values": batch.pictures.patches.flatten(0, 1), "image_grid_thw": grid}
    mask = batch.tokens.ne(tokenizer().get_vocab()[END_OF_TEXT]).long()
    logits: torch.Tensor = model()(
        input_ids=batch.tokens, attention_mask=mask, mm_token_type_ids=batch.image_tokens.int(), **inputs
    ).logits
    return logits[:, :-1][batch.answers[:, 1:]]


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_forward_pass_is_that_of_transformers(step: int) -> None:
    for batch in maker().training(step):
        assert torch.allclose(forward(model(), batch).logits, logits_by_transformers(batch), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (8, 6)])
def test_the_vision_tower_is_that_of_transformers(grid: tuple[int, int]) -> None:
    patches = torch.randn(2, grid[0] * grid[1], 384, generator=torch.Generator().manual_seed(1))
    ours = image_features(model(), patches, grid)
    theirs = model().model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * 2))
    assert torch.allclose(ours.merged.flatten(0, 1), theirs.pooler_output, atol=1e-5)
    for mine, other in zip(ours.deepstack, theirs.deepstack_features, strict=True):
        assert torch.allclose(mine.flatten(0, 1), other, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
@pytest.mark.parametrize("scale", [1, 2])
def test_pixels_are_those_of_the_image_processor(size: tuple[int, int], scale: int) -> None:
    picture = draw(random_scene(random.Random(4), held_out=False), size[0] * scale, size[1] * scale)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=8,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    )(picture, return_tensors="np")
    resized = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    assert theirs["image_grid_thw"].tolist() == [[1, size[1] // 8, size[0] // 8]]
    np.testing.assert_allclose(patchify(resized[None])[0], theirs["pixel_values"], atol=1e-5)


def test_cells_are_labelled_with_what_they_show() -> None:
    rng = random.Random(2)
    for _ in range(100):
        scene = random_scene(rng, held_out=False)
        colours, kinds = cell_labels(scene, (64, 64))
        shown = {(list(COLOURS).index(s.colour) + 1, KINDS.index(s.kind) + 1) for s in scene.shapes}
        labelled = set(zip(colours.tolist(), kinds.tolist(), strict=True))
        assert shown <= labelled <= shown | {(0, 0), (IGNORED, IGNORED)}


def test_heads_ask_every_feature_level_and_every_digit() -> None:
    heads = Heads(num_features=3)
    for batch in maker().training(0):
        loss = heads.loss(batch, forward(model(), batch))
        assert loss is not None
        loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in heads.parameters())


def test_counted_numbers_know_their_last_tokens_and_their_end() -> None:
    marks = count_marks("98 99 100", 5)
    tokens = ["?"] * 5 + tokenizer().encode("98 99 100").tokens
    assert marks == [(6, 100, 2), (9, 100, 1), (13, 100, 0)]
    assert [tokens[at] for at, _, _ in marks] == ["8", "9", "0"]


def test_doubtful_tokens_weigh_more() -> None:
    sure, doubtful = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = torch.zeros(100, dtype=torch.long)
    logits = torch.stack([sure] * 99 + [doubtful])
    plain = torch.nn.functional.cross_entropy(logits, expected)
    assert 5 * plain < answer_loss(logits, expected) <= 10.5 * plain


@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(3))))
    assert 0.5 < values.min() < values.max() < 1.5


def test_a_step_has_the_same_data_each_time() -> None:
    for first, second in zip(maker().training(5), maker().training(5), strict=True):
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.positions, second.positions)
        if first.pictures is not None and second.pictures is not None:
            assert torch.equal(first.pictures.patches, second.pictures.patches)


def test_answers_are_marked_with_their_end() -> None:
    batch = maker().held_out("caption", 2)
    said = tokenizer().decode(batch.tokens[0][batch.answers[0]].tolist(), skip_special_tokens=False)
    assert said.endswith(".<|im_end|>")
    assert said.startswith("a")
