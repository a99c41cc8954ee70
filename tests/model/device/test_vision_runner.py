"""Images into the pool: rows to their blocks and nowhere else, checksums to their images, bad images alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from epd.errors import BadConfig, BadImage
from epd.model.device.vision_attention import Sequences, dense
from epd.model.device.vision_runner import DeviceVisionRunner
from epd.step import ImageInput
from gpu.deferred import Deferred
from tests.model.device.engine import Target
from tests.model.device.vision import BLOCK_ROWS, DeviceVision, images_of, reference_rows
from tests.model.reference import VL_NAMES, Model

ModelOf = Callable[[str], Model]
NAME = "vl-deepstack2-tied"


@pytest.mark.parametrize("name", VL_NAMES)
def test_a_broken_image_fails_alone(name: str, model_of: ModelOf, target: Target) -> None:
    model = model_of(name)
    first, second = images_of(model, [(40, 33), (60, 33)])
    cut = ImageInput("cut", second.data[:150], second.grid, second.num_tokens)
    device = DeviceVision(model, target)
    patches = [device.runner.preprocess(image) for image in (first, cut, second)]
    blocks = [device.blocks_for(image) for image in (first, cut, second)]
    answer = device.runner.encode_patches(patches, [image.grid for image in (first, cut, second)], blocks)
    assert not isinstance(answer, Deferred)
    assert isinstance(answer[1], BadImage)
    assert [answer[0], answer[2]] == [device.checksum(blocks[0]), device.checksum(blocks[2])]
    for ids, image, expected in zip((blocks[0], blocks[2]), (first, second), reference_rows(model, [first, second]), strict=True):
        rows = device.rows[ids].flatten(0, 1)[: image.num_tokens].cpu()
        assert (rows - expected).abs().max() < 1e-4 * expected.abs().max()
    assert device.rows[blocks[1]].isnan().all()


def test_nothing_but_broken_images_is_no_error(model_of: ModelOf, target: Target) -> None:
    device = DeviceVision(model_of(NAME), target)
    error = BadImage("broken")
    assert device.runner.encode_patches([error], [(1, 2, 2)], [[0]]) == (error,)
    assert device.runner.encode_patches([], [], []) == ()
    assert device.rows.isnan().all()


def test_only_the_blocks_of_the_images_are_written(model_of: ModelOf, target: Target) -> None:
    device = DeviceVision(model_of(NAME), target)
    images = images_of(device.model)
    device.encode(images)
    written = (~device.rows.flatten(1).isnan()).all(1)
    assert int(written.sum()) == sum(-(-image.num_tokens // BLOCK_ROWS) for image in images)
    assert device.rows[~written].isnan().all()


def test_images_are_batched_by_rising_length_whatever_their_order(model_of: ModelOf, target: Target) -> None:
    device = DeviceVision(model_of(NAME), target)
    seen: set[tuple[int, ...]] = set()

    def watching(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        seen.add(sequences.lengths)
        assert sequences.starts.tolist() == [0, *np.cumsum(sequences.lengths)]
        return dense(q, k, v, sequences)

    device.tower.attention = watching
    images = images_of(device.model)
    device.encode(images)
    assert seen == {tuple(sorted(image.grid[1] * image.grid[2] for image in images))}


def test_the_answer_comes_when_the_checksums_have(model_of: ModelOf, target: Target) -> None:
    device = DeviceVision(model_of(NAME), target, is_late=True)
    images = images_of(device.model, [(64, 64), (20, 90)])
    patches = [device.runner.preprocess(image) for image in images]
    blocks = [device.blocks_for(image) for image in images]
    answer = device.runner.encode_patches(patches, [image.grid for image in images], blocks)
    assert isinstance(answer, Deferred)
    assert [late.num_asked for late in device.late] == [0]
    sums = answer.value()
    device.is_late = False
    assert list(sums) == [device.checksum(ids) for ids in blocks]


@pytest.mark.parametrize(
    ("blocks", "error", "said"),
    [
        ([0, 1], ValueError, "9 rows do not fill 2 blocks of 4"),
        ([0] * 4, ValueError, "9 rows do not fill 4 blocks of 4"),
        ([0, 1, -1], IndexError, "not all inside a pool of 400"),
        ([0, 1, 400], IndexError, "not all inside a pool of 400"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_before_anything_is_written(
    blocks: list[int], error: type[Exception], said: str, model_of: ModelOf, target: Target
) -> None:
    device = DeviceVision(model_of(NAME), target)
    images = images_of(device.model, [(88, 88)])
    assert images[0].num_tokens == 9
    patches = [device.runner.preprocess(image) for image in images]
    with pytest.raises(error, match=said):
        device.runner.encode_patches(patches, [images[0].grid], [blocks])
    if error is ValueError:
        with pytest.raises(ValueError, match="patches for an image of grid"):
            device.runner.encode_patches([np.zeros((3, 192), np.uint8)], [images[0].grid], [[0, 1, 2]])
    assert device.rows.isnan().all()


def test_a_pool_of_other_blocks_is_refused(model_of: ModelOf, target: Target) -> None:
    device = DeviceVision(model_of(NAME), target)
    image = device.model.config.image
    assert image is not None
    for rows in (device.rows[:, :, 1:], device.rows.to(torch.float16), device.rows.flatten(1)):
        with pytest.raises(BadConfig, match="not those of this model"):
            DeviceVisionRunner(device.tower, image, rows, device.checksum)
