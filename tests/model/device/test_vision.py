"""The device's vision tower against transformers: the same in float32, and in bfloat16 no worse than transformers' own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import epd.model.device.vision
from epd.cluster.budget import encode_bytes
from epd.model.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from epd.model.device.vision import DeviceVisionModel
from epd.model.device.vision_runner import DeviceVisionRunner
from epd.model.weights import Placement, load_vision_weights
from gpu.cuda.reference import TorchKernels
from tests.model.device.engine import Target
from tests.model.device.vision import DeviceVision, images_of, reference_rows
from tests.model.reference import VL_NAMES, Model

ModelOf = Callable[[str], Model]
# As Qwen3-VL-8B-Instruct is published.
PUBLISHED = ModelConfig(
    architecture="Qwen3VLForConditionalGeneration",
    text=TextConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 5e6, (24, 20, 20), False, False, 262144),
    vision=VisionConfig(27, 1152, 4304, 16, 3, 16, 2, 2, 4096, 2304, (8, 16, 24)),
    image=ImageConfig(16, 2, 2, 65536, 16777216, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3, 1 / 255),
    eos_token_ids=(151645,),
)


@pytest.mark.parametrize("name", VL_NAMES)
def test_rows_equal_those_of_transformers(name: str, model_of: ModelOf, target: Target) -> None:
    model = model_of(name)
    images = images_of(model)
    for mine, theirs in zip(DeviceVision(model, target).encode(images), reference_rows(model, images), strict=True):
        assert mine.shape == theirs.shape
        assert _error(mine, theirs) < 1e-4


@pytest.mark.parametrize("name", VL_NAMES)
def test_half_precision_is_as_good_as_that_of_transformers(name: str, model_of: ModelOf, half_target: Target) -> None:
    model = model_of(name)
    images = images_of(model)
    exact = torch.cat(reference_rows(model, images))
    theirs = torch.cat(reference_rows(model, images, torch.bfloat16))
    mine = torch.cat(DeviceVision(model, half_target).encode(images))
    assert (mine - exact).norm() <= 1.25 * (theirs - exact).norm()
    assert (mine - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", VL_NAMES)
def test_an_image_is_the_same_alone_and_in_a_batch(name: str, model_of: ModelOf, target: Target) -> None:
    model = model_of(name)
    images = images_of(model, [(100, 20), (20, 100), (50, 50)])
    device = DeviceVision(model, target)
    for image, together in zip(images, device.encode(images), strict=True):
        assert _error(device.encode([image])[0], together) < 1e-4


@pytest.mark.parametrize("name", VL_NAMES)
def test_embedding_a_part_at_a_time_changes_nothing(
    name: str, model_of: ModelOf, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    images = images_of(model)
    whole = DeviceVision(model, target).encode(images)
    monkeypatch.setattr(epd.model.device.vision, "_PART", 7)
    for mine, theirs in zip(DeviceVision(model, target).encode(images), whole, strict=True):
        assert _error(mine, theirs) < 1e-5


def test_weights_that_are_there_are_not_copied(model_of: ModelOf) -> None:
    model = model_of(VL_NAMES[0])
    assert model.vision_weights is not None
    target = Target(torch.device("cpu"), torch.float32, TorchKernels())
    tower = DeviceVision(model, target).tower
    name = "model.visual.blocks.0.mlp.linear_fc1.weight"
    assert tower._blocks[0]._fc1.weight.data_ptr() == model.vision_weights.tensor(name).data_ptr()


@pytest.mark.gpu
def test_no_step_waits_for_the_device(model_of: ModelOf) -> None:
    """A value that the host asks the device for raises here."""
    model = model_of(VL_NAMES[0])
    device = DeviceVision(model, Target(torch.device("cuda", 0), torch.bfloat16, TorchKernels()))
    device.runner._checksum = lambda ids: [0] * len(ids)
    device.runner.prepare()
    images = images_of(model)
    patches = [device.runner.preprocess(image) for image in images]
    blocks = [device.blocks_for(image) for image in images]
    grids = [image.grid for image in images]
    device.runner.encode_patches(patches, grids, blocks)  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        device.runner.encode_patches(patches, grids, blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_of_the_published_tower_takes_no_more_memory_than_planned() -> None:
    """Eight images of 1920 x 1080, random weights."""
    rows = torch.empty(8 * 32, 64, PUBLISHED.embedding_width, dtype=torch.bfloat16, device="cuda")
    weights = load_vision_weights(PUBLISHED, "nowhere", "dummy", placement=Placement("cuda", "bfloat16"))
    assert PUBLISHED.vision is not None
    assert PUBLISHED.image is not None
    tower = DeviceVisionModel(PUBLISHED.vision, PUBLISHED.image, weights, torch.device("cuda", 0), torch.bfloat16)
    runner = DeviceVisionRunner(tower, PUBLISHED.image, rows, lambda ids: [0] * len(ids))
    runner.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pixels = np.random.default_rng(0).integers(0, 256, (8160, 768), np.uint8)
    blocks = np.arange(8 * 32).reshape(8, 32).tolist()
    runner.encode_patches([pixels] * 8, [(1, 68, 120)] * 8, blocks)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= encode_bytes(PUBLISHED, 8 * 8160, 2)
    assert not rows.isnan().any()


def _error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())
