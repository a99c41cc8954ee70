from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.triton.cases.inputs import GEOMETRIES, SMALL, assert_close, kv_pool, normal
from tests.gpu.kernels.paged import Geometry

NUM_BLOCKS = 5


def run(
    kernels: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    slots: list[int],
    layer: int,
    *,
    has_norm: bool,
) -> tuple[Tensor, Tensor]:
    """(queries, pool): the pool was filled with one number before."""
    g, num_tokens = geometry, len(slots)
    qkv = normal((num_tokens, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim), dtype, device, 1)
    norms = normal((2, g.head_dim), dtype, device, 2) if has_norm else (None, None)
    angles = 3 * normal((num_tokens, g.head_dim // 2), torch.float32, device, 3)
    pool = torch.full_like(kv_pool(g, NUM_BLOCKS + 1, dtype, device), 9.0)  # the last block is beyond the pool
    q_out = torch.full((num_tokens, g.num_heads, g.head_dim), torch.nan, dtype=dtype, device=device)
    at = torch.tensor(slots, dtype=torch.int64, device=device)
    kernels.rope_store(qkv, norms[0], norms[1], 1e-6, angles.cos(), angles.sin(), pool[:NUM_BLOCKS], layer, at, q_out)
    return q_out, pool


def compare(
    kernels: Kernels,
    twin: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    slots: list[int],
    layer: int = 1,
    *,
    has_norm: bool = True,
) -> None:
    actual = run(kernels, geometry, dtype, device, slots, layer, has_norm=has_norm)
    expected = run(twin, geometry, dtype, device, slots, layer, has_norm=has_norm)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert torch.equal(actual[1][:, layer, 1], expected[1][:, layer, 1])  # values: bit by bit


@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry(6, 3, 20, 3)], ids=str)
def test_slots_in_no_order(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> None:
    last = NUM_BLOCKS * geometry.block_size - 1
    compare(kernels, twin, geometry, dtype, device, [geometry.block_size, last, 0, 2])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("has_norm", [True, False])
def test_layers_and_models_without_norms(
    kernels: Kernels, twin: Kernels, device: torch.device, layer: int, has_norm: bool
) -> None:
    compare(kernels, twin, SMALL, torch.float32, device, [3, 4], layer, has_norm=has_norm)


@pytest.mark.parametrize("slots", [[], [-1], [-1, 6, 1 << 40, NUM_BLOCKS * SMALL.block_size, -5]], ids=str)
def test_padding_is_stored_nowhere(kernels: Kernels, twin: Kernels, device: torch.device, slots: list[int]) -> None:
    compare(kernels, twin, SMALL, torch.float32, device, slots)


def test_a_layer_outside_of_the_pool(kernels: Kernels, device: torch.device) -> None:
    with pytest.raises(IndexError, match="layer 2"):
        run(kernels, SMALL, torch.float32, device, [0], 2, has_norm=True)
