"""The vision tower against transformers' get_image_features, for one image and for batches of different sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from epd.model.preprocess import image_grid, preprocess
from epd.model.vision import VisionModel
from tests.model.reference import VL_NAMES, Model, image_rows, png

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("name", VL_NAMES)
def test_rows_equal_those_of_transformers(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    ours, reference = _both(model, [(64, 64), (37, 91), (8, 200), (37, 91), (30, 30)])
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == theirs.shape
        assert mine.shape[1] == model.config.embedding_width
        assert np.abs(mine - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.parametrize("name", VL_NAMES)
def test_an_image_is_the_same_alone_and_in_a_batch(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    sizes = [(100, 20), (20, 100), (50, 50)]
    together = _both(model, sizes)[0]
    for i, size in enumerate(sizes):
        alone = _both(model, [size], seed=i)[0][0]
        np.testing.assert_allclose(alone, together[i], rtol=0, atol=1e-4 * float(np.abs(alone).max()))


def _both(model: Model, sizes: list[tuple[int, int]], seed: int = 0) -> tuple[list[Floats], list[Floats]]:
    """Ours and transformers' rows; image i is drawn from seed + i."""
    assert model.config.image is not None
    assert model.config.vision is not None
    assert model.vision_weights is not None
    files = [png(np.random.default_rng(seed + i), *size) for i, size in enumerate(sizes)]
    grids = [image_grid(data, model.config.image) for data in files]
    patches = [preprocess(data, grid, model.config.image) for data, grid in zip(files, grids, strict=True)]
    ours = VisionModel(model.config.vision, model.vision_weights).forward(patches, grids)
    with torch.no_grad():
        output = model.reference.model.get_image_features(torch.from_numpy(np.concatenate(patches)), torch.tensor(grids))
    return ours, [rows.numpy() for rows in image_rows(output, [len(rows) for rows in ours])]
