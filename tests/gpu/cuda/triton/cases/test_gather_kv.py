from __future__ import annotations

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.triton.cases.inputs import GEOMETRIES, SMALL, kv_pool, tables
from tests.gpu.kernels.paged import Geometry


@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry(3, 3, 20, 3)], ids=str)
def test_every_bit_arrives(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> None:
    size = geometry.block_size
    for num_tokens in (0, 1, size - 1, size, size + 1, 600 // size * size + 3):
        num_blocks = -(-num_tokens // size) + 2
        pool = kv_pool(geometry, num_blocks, dtype, device)
        table = tables(geometry, [num_tokens], num_blocks, device)[0]
        shape = (2, geometry.num_kv_heads, num_tokens, geometry.head_dim)
        out, expected = torch.full(shape, 9.0, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        kernels.gather_kv(pool, 1, table, num_tokens, out[0], out[1])
        twin.gather_kv(pool, 1, table, num_tokens, expected[0], expected[1])
        assert torch.equal(out, expected)


def test_blocks_outside_of_the_pool_are_left_out(kernels: Kernels, twin: Kernels, device: torch.device) -> None:
    pool = kv_pool(SMALL, 3, torch.float32, device)
    table = torch.tensor([2, -1, 3, 0], dtype=torch.int32, device=device)
    out = torch.full((2, SMALL.num_kv_heads, 15, SMALL.head_dim), 9.0, device=device)
    expected = out.clone()
    kernels.gather_kv(pool, 0, table, 15, out[0], out[1])
    twin.gather_kv(pool, 0, table, 15, expected[0], expected[1])
    assert torch.equal(out, expected)
    assert (out[:, :, 4:12] == 9.0).all()
