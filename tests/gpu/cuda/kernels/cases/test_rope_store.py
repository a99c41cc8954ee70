from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.kernels.cases.inputs import QWEN3_VL_8B, SMALL, assert_close, normal, on_device_too, pool_of
from tests.gpu.kernels.paged import Geometry

GEOMETRIES = on_device_too([SMALL, Geometry(3, 1, 32, 8), Geometry(2, 2, 64, 16)], [QWEN3_VL_8B, Geometry(8, 2, 256, 32)])


class Case:
    def __init__(self, geometry: Geometry, dtype: torch.dtype, device: torch.device, slots: list[int]) -> None:
        g, num_tokens = geometry, len(slots)
        self.qkv = 2 * normal((num_tokens, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim), dtype, device, 1)
        self.q_norm: Tensor | None = normal((g.head_dim,), dtype, device, 2)
        self.k_norm: Tensor | None = normal((g.head_dim,), dtype, device, 3)
        angles = 10 * normal((num_tokens, g.head_dim // 2), torch.float32, device, 4)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.pool = pool_of(g, 3, dtype, device)
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.q_out = torch.full((num_tokens, g.num_heads, g.head_dim), torch.nan, dtype=dtype, device=device)

    def run(self, kernels: Kernels, layer: int = 1) -> tuple[Tensor, Tensor]:
        """The queries, and the pool as it is then."""
        pool, q_out = self.pool.clone(), self.q_out.clone()
        kernels.rope_store(self.qkv, self.q_norm, self.k_norm, 1e-3, self.cos, self.sin, pool, layer, self.slots, q_out)
        return q_out, pool


def compare(case: Case, kernels: Kernels, twin: Kernels) -> None:
    (q_out, pool), (expected_q, expected_pool) = case.run(kernels), case.run(twin)
    assert_close(q_out, expected_q)
    assert_close(pool[:, 1, 0], expected_pool[:, 1, 0])
    assert torch.equal(pool[:, 1, 1], expected_pool[:, 1, 1])  # values are stored as they are
    assert torch.equal(pool[:, 0], case.pool[:, 0])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("has_norm", [True, False])
def test_it_is_its_twin(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry, has_norm: bool
) -> None:
    size = geometry.block_size
    case = Case(geometry, dtype, device, [size + 1, 0, 3 * size - 1])
    if not has_norm:
        case.q_norm = case.k_norm = None
    compare(case, kernels, twin)


@pytest.mark.parametrize("num_tokens", on_device_too([0, 1, 2], [300]))
def test_any_number_of_tokens(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    compare(Case(SMALL, dtype, device, [*range(min(num_tokens, 24)), *[-1] * (num_tokens - 24)]), kernels, twin)


def test_slots_outside_of_the_pool_store_nothing(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    case = Case(SMALL, dtype, device, [-1, 24, 5, -(1 << 40), 1 << 40])
    compare(case, kernels, twin)
    _, pool = case.run(kernels)
    changed = (pool != case.pool).any(dim=-1).nonzero()
    assert {(block, place) for block, _, _, _, place in changed.tolist()} == {(0, 5)}


def test_what_does_not_fit_is_refused(kernels: Kernels, device: torch.device) -> None:
    with pytest.raises(IndexError, match="layer 2"):
        Case(SMALL, torch.float32, device, [0]).run(kernels, layer=2)
    with pytest.raises(ValueError, match="not whole 16-byte units"):
        Case(Geometry(1, 1, 8, 8), torch.bfloat16, device, [0]).run(kernels)
    with pytest.raises(ValueError, match="block_size is 5, not a power of two"):
        Case(Geometry(1, 1, 16, 5), torch.float32, device, [0]).run(kernels)
    one = Case(SMALL, torch.float32, device, [0])
    one.k_norm = None
    with pytest.raises(ValueError, match="both normalised or neither"):
        one.run(kernels)
