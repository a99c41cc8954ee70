from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.triton import TritonKernels
from tests.gpu.cuda.triton.cases.inputs import GEOMETRIES, SMALL, assert_close, kv_pool, normal, tables
from tests.gpu.kernels.paged import Geometry


def attend(
    kernels: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    context_lens: list[int],
    *,
    spare_columns: int = 0,
    gain: float = 1.0,
) -> Tensor:
    g, num_seqs = geometry, len(context_lens)
    num_blocks = sum(-(-length // g.block_size) for length in context_lens) + 2
    q = gain * normal((num_seqs, g.num_heads, g.head_dim), dtype, device, 1)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    block_tables = tables(g, context_lens, num_blocks, device)
    columns = block_tables.shape[1] + spare_columns
    wide = torch.full((num_seqs, columns + 3), 1 << 30, dtype=torch.int32, device=device)[:, :columns]  # rows lie apart
    wide[:, : block_tables.shape[1]] = block_tables
    workspace = torch.full(
        (kernels.workspace_floats(num_seqs + 1, g.num_heads, g.num_kv_heads, g.head_dim),), torch.nan, device=device
    )
    out = torch.full_like(q, torch.nan)
    kernels.paged_attention(q, kv_pool(g, num_blocks, dtype, device), 1, wide, lens, g.head_dim**-0.5, out, workspace)
    return out


def compare(
    kernels: Kernels,
    twin: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    context_lens: list[int],
    spare_columns: int = 0,
    gain: float = 1.0,
) -> None:
    actual = attend(kernels, geometry, dtype, device, context_lens, spare_columns=spare_columns, gain=gain)
    assert_close(actual, attend(twin, geometry, dtype, device, context_lens, gain=gain))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_context_lengths_around_a_block(
    kernels: Kernels, twin: Kernels, device: torch.device, main_dtype: torch.dtype, geometry: Geometry
) -> None:
    size = geometry.block_size
    compare(kernels, twin, geometry, main_dtype, device, [0, 1, size - 1, size, size + 1, 63, 65, 129])


@pytest.mark.parametrize("context_lens", [[1], [64], [65], [500], [300, 0], [0, 0], []], ids=str)
def test_one_long_context_is_cut_into_parts(
    kernels: Kernels, twin: Kernels, device: torch.device, context_lens: list[int]
) -> None:
    compare(kernels, twin, SMALL, torch.float32, device, context_lens)


def test_uneven_contexts_in_long_tables(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    compare(kernels, twin, SMALL, dtype, device, [1, 400, 0, 17, 64], spare_columns=2000)


def test_no_parts_at_all(device: torch.device, twin: Kernels) -> None:
    compare(TritonKernels(num_sms=1), twin, SMALL, torch.float32, device, [0, 5, 64, 200, 65])


def test_more_parts_than_are_merged_at_once(device: torch.device, twin: Kernels) -> None:
    compare(TritonKernels(num_sms=132), twin, Geometry(16, 1, 16, 16), torch.float32, device, [32 * 63 + 1])


def test_large_scores_do_not_overflow(kernels: Kernels, twin: Kernels, device: torch.device) -> None:
    compare(kernels, twin, SMALL, torch.float32, device, [1, 40, 300], gain=100.0)


def test_bad_block_ids_spoil_their_own_row_only(kernels: Kernels, device: torch.device) -> None:
    pool, q = kv_pool(SMALL, 4, torch.float32, device), normal((2, 4, 16), torch.float32, device, 1)
    lens = torch.tensor([8, 8], dtype=torch.int32, device=device)
    workspace = torch.empty(kernels.workspace_floats(2, 4, 2, 16), device=device)
    outs = torch.empty((2, *q.shape), device=device)
    for out, first in zip(outs, ([1, 2], [1 << 30, -7]), strict=True):
        block_tables = torch.tensor([first, [0, 3]], dtype=torch.int32, device=device)
        kernels.paged_attention(q, pool, 0, block_tables, lens, 0.25, out, workspace)
    assert torch.equal(outs[0, 1], outs[1, 1])
    assert outs.isfinite().all()


def test_arguments_that_do_not_fit(kernels: Kernels, device: torch.device) -> None:
    q, lens = normal((1, 3, 24), torch.float32, device, 1), torch.ones(1, dtype=torch.int32, device=device)
    table = torch.zeros((1, 1), dtype=torch.int32, device=device)
    pool = kv_pool(Geometry(3, 3, 24, 4), 1, torch.float32, device)
    with pytest.raises(ValueError, match="workspace"):
        kernels.paged_attention(q, pool, 0, table, lens, 1.0, q.clone(), torch.empty(5, device=device))
    with pytest.raises(ValueError, match="heads of 24"):
        kernels.paged_attention(q, pool, 0, table, lens, 1.0, q.clone(), torch.empty(1 << 20, device=device))
