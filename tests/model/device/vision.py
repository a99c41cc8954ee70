"""Images for a device's vision tower, a pool for its rows, and what transformers makes of the same images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from epd.model.device.vision import DeviceVisionModel
from epd.model.device.vision_runner import DeviceVisionRunner
from epd.model.preprocess import Grid, image_grid, num_image_tokens, preprocess
from epd.step import ImageInput
from gpu.deferred import Deferred, Now
from tests.model.device.engine import Target
from tests.model.reference import Model, image_rows, png

BLOCK_ROWS = 4
SIZES = ((64, 64), (37, 91), (8, 200), (37, 91), (30, 30))


def images_of(model: Model, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[ImageInput]:
    """Image i is drawn from seed + i."""
    assert model.config.image is not None
    images: list[ImageInput] = []
    for i, size in enumerate(sizes):
        data = png(np.random.default_rng(seed + i), *size)
        grid = image_grid(data, model.config.image)
        images.append(ImageInput(f"{seed + i}", data, grid, num_image_tokens(grid, model.config.image.merge_size)))
    return images


def reference_rows(model: Model, images: Sequence[ImageInput], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Per image [num_tokens, embedding_width] float32, computed in `dtype` by transformers on the CPU."""
    assert model.config.image is not None
    tower = model.reference.model if dtype == torch.float32 else copy.deepcopy(model.reference.model).to(dtype)
    patches = [preprocess(image.data, image.grid, model.config.image) for image in images]
    with torch.no_grad():
        output = tower.get_image_features(
            torch.from_numpy(np.concatenate(patches)).to(dtype), torch.tensor([image.grid for image in images])
        )
    return [rows.float() for rows in image_rows(output, [image.num_tokens for image in images])]


@dataclass
class DeviceVision:
    """A runner over a pool of its own, of which nothing has been written."""

    model: Model
    target: Target
    num_blocks: int = 400
    late: list[_Late] = field(default_factory=list)
    is_late: bool = False  # whether checksums come after the call

    def __post_init__(self) -> None:
        config, image = self.model.config, self.model.config.image
        assert config.vision is not None
        assert image is not None
        assert self.model.vision_weights is not None
        self.tower = DeviceVisionModel(config.vision, image, self.model.vision_weights, self.target.device, self.target.dtype)
        shape = (self.num_blocks, BLOCK_ROWS, config.embedding_width)
        self.rows = torch.full(shape, float("nan"), dtype=self.target.dtype).to(self.target.device)
        self.runner = DeviceVisionRunner(self.tower, image, self.rows, self.checksum)
        self._free = iter(np.random.default_rng(7).permutation(self.num_blocks).tolist())

    def checksum(self, block_ids: Sequence[int]) -> Now[list[int]]:
        """Of a kind: what the blocks hold, summed."""
        numbers = torch.int16 if self.rows.dtype.itemsize == 2 else torch.int32
        sums = [int(self.rows[block_id].view(numbers).sum()) for block_id in block_ids]
        if not self.is_late:
            return sums
        self.late.append(_Late(sums))
        return self.late[-1]

    def blocks_for(self, image: ImageInput) -> list[int]:
        return [next(self._free) for _ in range(-(-image.num_tokens // BLOCK_ROWS))]

    def encode(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """Rows per image, float32 on the host, read back from the pool."""
        patches = [self.runner.preprocess(image) for image in images]
        blocks = [self.blocks_for(image) for image in images]
        grids: list[Grid] = [image.grid for image in images]
        answer = self.runner.encode_patches(patches, grids, blocks)
        sums = answer.value() if isinstance(answer, Deferred) else answer
        result: list[Tensor] = []
        for image, ids, told in zip(images, blocks, sums, strict=True):
            held = self.checksum(ids)
            assert told == (held.value() if isinstance(held, Deferred) else held)
            rows = self.rows[ids].flatten(0, 1).float().cpu()
            assert not rows[image.num_tokens :].any()
            result.append(rows[: image.num_tokens])
        return result


class _Late(Deferred[list[int]]):
    def __init__(self, sums: list[int]) -> None:
        self.sums = sums
        self.num_asked = 0

    def value(self) -> list[int]:
        self.num_asked += 1
        return self.sums
