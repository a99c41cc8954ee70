from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.kernels.device import SIMULATED
from tests.gpu.cuda.kernels.cases.inputs import (
    QWEN3_VL_8B,
    SMALL,
    assert_close,
    normal,
    on_device_too,
    pool_of,
    tables_of,
)
from tests.gpu.kernels.paged import Geometry

# groups of one, of a power of two, of another number, and of more heads than a team has threads
GEOMETRIES = on_device_too(
    [Geometry(2, 2, 32, 8), Geometry(8, 2, 32, 16), Geometry(3, 1, 32, 8), Geometry(8, 1, 16, 8), Geometry(2, 1, 128, 32)],
    [QWEN3_VL_8B, Geometry(16, 2, 128, 16), Geometry(7, 1, 128, 64), Geometry(8, 8, 64, 16), Geometry(12, 1, 64, 16)],
)
ENOUGH_TO_STAY_WHOLE = 12 if SIMULATED else 2048  # sequences times KV heads


class Case:
    def __init__(self, geometry: Geometry, dtype: torch.dtype, device: torch.device, context_lens: list[int]) -> None:
        g, num_seqs = geometry, len(context_lens)
        num_blocks = sum(-(-length // g.block_size) for length in context_lens) + 2
        self.geometry, self.device = geometry, device
        self.q = normal((num_seqs, g.num_heads, g.head_dim), dtype, device, 1)
        self.pool = pool_of(g, num_blocks, dtype, device)
        self.tables = tables_of(g, context_lens, num_blocks, device)
        self.lens = torch.tensor(context_lens, dtype=torch.int32, device=device)

    def run(self, kernels: Kernels) -> Tensor:
        g = self.geometry
        floats = kernels.workspace_floats(len(self.q), g.num_heads, g.num_kv_heads, g.head_dim)
        workspace = torch.full((floats,), torch.nan, device=self.device)
        out = torch.full_like(self.q, torch.nan)
        kernels.paged_attention(self.q, self.pool, 1, self.tables, self.lens, g.head_dim**-0.5, out, workspace)
        return out


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_context_lengths_around_a_block(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry
) -> None:
    """Split: there are few sequences."""
    size = geometry.block_size
    case = Case(geometry, dtype, device, [0, 1, size - 1, size + 1])
    assert_close(case.run(kernels), case.run(twin))


@pytest.mark.parametrize("context_len", on_device_too([16, 17, 33], [63, 64, 65, 1000, 4096, 30000]))
def test_lengths_around_a_split(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, context_len: int
) -> None:
    case = Case(SMALL, dtype, device, [context_len])
    assert_close(case.run(kernels), case.run(twin))


@pytest.mark.parametrize("geometry", [SMALL, *([] if SIMULATED else [QWEN3_VL_8B])], ids=str)
def test_many_sequences_are_not_split(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry
) -> None:
    num_seqs = ENOUGH_TO_STAY_WHOLE // geometry.num_kv_heads
    lens = [(0, 1, geometry.block_size, geometry.block_size + 3)[i % 4] for i in range(num_seqs)]
    case = Case(geometry, dtype, device, lens)
    assert_close(case.run(kernels), case.run(twin))


def test_a_row_of_padding_is_zero(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(SMALL, dtype, device, [5, 0])
    case.tables[1] = -1
    assert not case.run(kernels)[1].any()


def test_what_lies_beyond_a_context_has_no_say(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(SMALL, dtype, device, [5, 19])
    expected = case.run(kernels)
    for row, context_len in zip(case.tables.tolist(), (5, 19), strict=True):
        case.pool[row[context_len // 8], :, :, :, context_len % 8 :] = torch.nan
    assert torch.equal(case.run(kernels), expected)


def test_scores_that_rise_and_fall_by_hundreds(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(SMALL, dtype, device, [40])
    case.pool[:, :, 0] *= torch.linspace(1, 100, len(case.pool), device=device).to(dtype)[:, None, None, None, None]
    case.q *= 5
    assert_close(case.run(kernels), case.run(twin))


def test_rows_of_tables_may_lie_apart_and_wrong_ids_hurt_only_their_row(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    case = Case(SMALL, dtype, device, [9, 9, 9])
    expected = case.run(twin)
    wide = torch.full((3, 11), 1 << 30, dtype=torch.int32, device=device)
    wide[:, 2 : 2 + case.tables.shape[1]] = case.tables
    wide[1, 2:4] = torch.tensor([-(1 << 31), (1 << 31) - 1])
    case.tables = wide[:, 2 : 2 + case.tables.shape[1]]
    found = case.run(kernels)
    assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1].isfinite().all()


def test_a_context_longer_than_its_table_ends_with_it(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    case = Case(SMALL, dtype, device, [16])
    expected = case.run(kernels)
    case.lens += 100
    case.tables = case.tables[:, :2]
    assert torch.equal(case.run(kernels), expected)


def test_the_batch_around_a_sequence_changes_little(kernels: Kernels, device: torch.device) -> None:
    """It changes how the sequence is split, and nothing else."""
    many = Case(SMALL, torch.float32, device, [33] * (ENOUGH_TO_STAY_WHOLE // SMALL.num_kv_heads))
    found = many.run(kernels)
    many.q, many.tables, many.lens = many.q[:1], many.tables[:1], many.lens[:1]
    assert_close(many.run(kernels), found[:1])


def test_no_sequences(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    assert Case(SMALL, dtype, device, []).run(kernels).shape == (0, 4, 16)


def test_what_does_not_fit_is_refused(kernels: Kernels, device: torch.device) -> None:
    case = Case(SMALL, torch.float32, device, [3])
    with pytest.raises(ValueError, match=r"the workspace has 7 floats and not \d+"):
        kernels.paged_attention(case.q, case.pool, 0, case.tables, case.lens, 1.0, case.q.clone(), torch.zeros(7, device=device))
    case.lens = case.lens.long()
    with pytest.raises(TypeError, match=r"context_lens is torch\.int64"):
        case.run(kernels)
    with pytest.raises(ValueError, match="a power of two"):
        Case(Geometry(1, 1, 48, 8), torch.float32, device, [1]).run(kernels)
