"""The runner that encode drives on a device: files in on one stream, rows written to the embedding pool on another.

Owns the order of a step: grey levels and places of all patches in one copy, the tower, rows straight to their blocks, checksums.
Waits for none of it. Does not know the tower's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epd.errors import BadConfig, BadImage
from epd.model.config import ImageConfig
from epd.model.device.inputs import Layout, Staging
from epd.model.device.vision import DeviceVisionModel, Patches
from epd.model.device.vision_attention import Sequences, Timed, choose
from epd.model.device.work_queue import WorkQueue, open_queue
from epd.model.preprocess import Grid, pixel_patches
from epd.step import ImageInput
from gpu.deferred import Deferred, Now

Levels = npt.NDArray[np.uint8]
Checksums = tuple[list[int] | Exception, ...]


class DeviceVisionRunner:
    """Encodes images into the embedding pool of its stage, those of one call together."""

    def __init__(
        self,
        model: DeviceVisionModel,
        image: ImageConfig,
        rows: Tensor,
        checksum: Callable[[Sequence[int]], Now[list[int]]],
        *,
        queue: WorkQueue | None = None,
    ) -> None:
        """`rows`: the pool's blocks as [num_blocks, block_rows, embedding_width] of the model's dtype; `checksum`: the pool's.

        Raises BadConfig for a pool of other blocks.
        """
        width = (1 + len(model.config.deepstack_layers)) * model.config.out_hidden_size
        if rows.ndim != 3 or rows.shape[2] != width or rows.dtype != model.dtype:
            raise BadConfig(f"the embedding pool's blocks, {list(rows.shape[1:])} of {rows.dtype}, are not those of this model")
        self.model = model
        self.timed: list[Timed] = []  # the kernels that `prepare` chose among
        self._image = image
        self._rows = rows.view(-1, width)
        self._num_blocks, self._block_rows = rows.shape[:2]
        self._checksum = checksum
        self._queue = queue or open_queue(model.device)
        self._staging = Staging(self._queue)
        self._queue.synchronize()  # what was made here may have been made on another stream than steps run on

    def prepare(self) -> None:
        """Choose the attention kernel by timing those there are, and make what a first image would have to wait for.

        On the stage's stream, before the pool is in use: it writes to the first blocks. Blocks.
        """
        config = self.model.config
        self.model.attention, self.timed = choose(
            self._queue,
            num_heads=config.num_heads,
            head_dim=config.hidden_size // config.num_heads,
            dtype=self.model.dtype,
        )
        self._rehearse()

    def preprocess(self, image: ImageInput) -> Levels | BadImage:
        """Grey levels of one image's patches, or what is wrong with it. Touches no device: may run beside encode_patches."""
        try:
            return pixel_patches(image.data, image.grid, self._image)
        except BadImage as error:
            return error

    @torch.inference_mode()
    def encode_patches(
        self, patches: Sequence[Levels | Exception], grids: Sequence[Grid], block_ids: Sequence[Sequence[int]]
    ) -> Now[Checksums]:
        """As VisionRunner says. Raises ValueError or IndexError, before it touches the pool, for blocks that do not fit."""
        images = [
            _Image(place, levels, grid, ids)
            for place, (levels, grid, ids) in enumerate(zip(patches, grids, block_ids, strict=True))
            if not isinstance(levels, Exception)
        ]
        outcome: list[list[int] | Exception] = [each if isinstance(each, Exception) else [] for each in patches]
        if not images:
            return tuple(outcome)
        images.sort(key=lambda image: image.grid[1] * image.grid[2])
        self._check(images)
        batch, targets, empty = self._send(images)
        self.model.forward(batch, lambda feature, rows: self._store(feature, rows, targets))
        self._rows.index_fill_(0, empty, 0.0)  # what the checksum covers is the same every time
        sums = self._checksum([block_id for image in images for block_id in image.block_ids])
        split = _Split(outcome, images, sums)
        return split if isinstance(sums, Deferred) else split.value()

    def close(self) -> None:
        """Let go of the pool's memory and the buffers, once the device is done with them."""
        self._queue.synchronize()
        del self._rows, self._staging, self._checksum

    def _rehearse(self) -> None:
        """An image of four rows, all black."""
        config = self.model.config
        side, num_blocks = 2 * config.merge_size, -(-4 // self._block_rows)
        black = np.zeros((side * side, config.in_channels * config.patch_size**2), np.uint8)
        sums = self.encode_patches([black], [(1, side, side)], [range(num_blocks)])
        self._queue.synchronize()
        del sums  # the host's memory that they have been brought to

    def _check(self, images: Sequence[_Image]) -> None:
        merged = self.model.config.merge_size**2
        for image in images:
            num_rows = image.num_patches // merged
            if len(image.levels) != image.num_patches:
                raise ValueError(f"{len(image.levels)} patches for an image of grid {image.grid}")
            if len(image.block_ids) != -(-num_rows // self._block_rows):
                raise ValueError(f"{num_rows} rows do not fill {len(image.block_ids)} blocks of {self._block_rows}")
            if not all(0 <= block_id < self._num_blocks for block_id in image.block_ids):
                raise IndexError(f"blocks {list(image.block_ids)} are not all inside a pool of {self._num_blocks}")

    def _send(self, images: Sequence[_Image]) -> tuple[Patches, Tensor, Tensor]:
        """The batch on the device, the pool's row of each token, and the pool's rows behind the images' last."""
        merge = self.model.config.merge_size
        frames = tuple(image.grid[1] * image.grid[2] for image in images for _ in range(image.grid[0]))
        places = [image.rows_in_pool(merge, self._block_rows) for image in images]
        targets, empty = (np.concatenate(each) for each in zip(*places, strict=True))
        num_patches = sum(frames)
        each = (num_patches,)
        layout = Layout(
            {
                "pixels": (torch.uint8, (num_patches, images[0].levels.shape[1])),
                "row": (torch.int32, each),
                "column": (torch.int32, each),
                "last_row": (torch.float32, each),
                "last_column": (torch.float32, each),
                "starts": (torch.int32, (len(frames) + 1,)),
                "targets": (torch.int64, targets.shape),
                "empty": (torch.int64, empty.shape),
            }
        )
        staged = self._staging.begin(layout)
        staged["starts"][:] = np.concatenate([[0], np.cumsum(frames)])
        staged["targets"][:], staged["empty"][:] = targets, empty
        start = 0
        for image in images:
            part = slice(start, start + image.num_patches)
            staged["pixels"][part] = image.levels
            staged["row"][part], staged["column"][part] = _places(image.grid, merge)
            staged["last_row"][part] = max(image.grid[1] - 1, 1)
            staged["last_column"][part] = max(image.grid[2] - 1, 1)
            start = part.stop
        sent = self._staging.send(staged)
        batch = Patches(
            pixels=sent["pixels"],
            row=sent["row"],
            column=sent["column"],
            last_row=sent["last_row"],
            last_column=sent["last_column"],
            frames=Sequences(frames, sent["starts"]),
        )
        return batch, sent["targets"], sent["empty"]

    def _store(self, feature: int, rows: Tensor, targets: Tensor) -> None:
        width = rows.shape[1]
        self._rows[:, feature * width : (feature + 1) * width].index_copy_(0, targets, rows)


class _Image:
    """One image of a call, and where it was in it."""

    def __init__(self, place: int, levels: Levels, grid: Grid, block_ids: Sequence[int]) -> None:
        self.place = place
        self.levels = levels
        self.grid = grid
        self.block_ids = block_ids

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def rows_in_pool(self, merge_size: int, block_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of the pool's rows, those of this image's tokens, and those behind the last of them in its last block."""
        blocks = np.asarray(self.block_ids, np.int64)[:, None] * block_rows
        rows = (blocks + np.arange(block_rows)).ravel()
        num_tokens = self.num_patches // merge_size**2
        return rows[:num_tokens], rows[num_tokens:]


class _Split(Deferred[Checksums]):
    """The checksums of all blocks of a call, given out to their images in the call's order."""

    def __init__(self, outcome: list[list[int] | Exception], images: Sequence[_Image], sums: Now[list[int]]) -> None:
        self._outcome = outcome
        self._counts = [(image.place, len(image.block_ids)) for image in images]
        self._sums = sums

    def value(self) -> Checksums:
        sums = self._sums.value() if isinstance(self._sums, Deferred) else self._sums
        start = 0
        for place, count in self._counts:
            self._outcome[place] = sums[start : start + count]
            start += count
        return tuple(self._outcome)


@lru_cache(maxsize=64)
def _places(grid: Grid, merge: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Row and column of each patch in merge-block order, of every frame."""
    frames, rows, columns = grid
    blocks = (rows // merge, merge, columns // merge, merge)
    row, column = (
        np.tile(index.reshape(blocks).transpose(0, 2, 1, 3).ravel(), frames) for index in np.indices((rows, columns), np.int32)
    )
    return row, column
