"""Rotations against transformers' rotary embedding, for one position per token and for M-RoPE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from epd.model.rope import RopeTable
from tests.model.reference import CASE_NAMES, VL_NAMES, Model


@pytest.mark.parametrize("name", CASE_NAMES)
def test_equal_those_of_transformers(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    positions = np.random.default_rng(1).integers(0, 900, (3, 40)).astype(np.int32)
    if name not in VL_NAMES:
        positions[:] = positions[0]
    cosine, sine = RopeTable(model.config.text).rotations(positions)
    given = torch.from_numpy(positions.astype(np.int64))
    inner = model.reference.model.language_model if name in VL_NAMES else model.reference.model
    expected = inner.rotary_emb(torch.zeros(1), given[:, None] if name in VL_NAMES else given[:1])
    half = model.config.text.head_dim // 2
    for ours, theirs in zip((cosine, sine), expected, strict=True):
        assert ours.shape == (40, half)
        assert ours.flags.c_contiguous
        np.testing.assert_allclose(ours, theirs[0, :, :half].numpy(), rtol=0, atol=2e-4)


def test_the_table_grows_to_any_position(model_of: Callable[[str], Model]) -> None:
    config = model_of("vl-deepstack2-tied").config.text
    table = RopeTable(config)
    early = table.rotations(_all(5))[0].copy()
    late = table.rotations(_all(100_000))[0]  # beyond what the model was made for, which is for others to refuse
    np.testing.assert_allclose(late[0, 0], np.cos(100_000.0), atol=1e-2)
    np.testing.assert_array_equal(table.rotations(_all(5))[0], early)


def _all(position: int) -> npt.NDArray[np.int32]:
    return np.full((3, 1), position, np.int32)
