from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Kernels
from gpu.cuda.triton import TritonKernels
from tests.gpu.cuda.chunks import chunks_of
from tests.gpu.cuda.triton.cases.inputs import GEOMETRIES, SMALL, assert_close, kv_pool, normal, tables
from tests.gpu.kernels.paged import Geometry


def attend(
    kernels: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: int,
    context_len: int,
    gain: float = 1.0,
) -> Tensor:
    g = geometry
    num_blocks = -(-context_len // g.block_size) + 2
    q = gain * normal((num_tokens, g.num_heads, g.head_dim), dtype, device, 1)
    out = torch.full_like(q, torch.nan)
    table = tables(g, [context_len], num_blocks, device)[0]
    kernels.chunk_attention(q, kv_pool(g, num_blocks, dtype, device), 1, table, context_len, g.head_dim**-0.5, out)
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chunks_around_a_block(
    kernels: Kernels, twin: Kernels, device: torch.device, main_dtype: torch.dtype, geometry: Geometry
) -> None:
    size = geometry.block_size
    for num_tokens, context_len in [(0, 3), (1, 1), (size - 1, size), (size, size), (size + 1, 2 * size + 1), (20, 70)]:
        actual = attend(kernels, geometry, main_dtype, device, num_tokens, context_len)
        assert_close(actual, attend(twin, geometry, main_dtype, device, num_tokens, context_len))


@pytest.mark.parametrize("num_sms", [1, 24, 500])
@pytest.mark.parametrize(("num_tokens", "context_len"), [(70, 70), (65, 193), (64, 64), (1, 200)])
def test_tiles_of_every_size(twin: Kernels, device: torch.device, num_sms: int, num_tokens: int, context_len: int) -> None:
    """How many multiprocessors there are decides between tiles of 128, 64 and 16 rows."""
    actual = attend(TritonKernels(num_sms), SMALL, torch.bfloat16, device, num_tokens, context_len)
    assert_close(actual, attend(twin, SMALL, torch.bfloat16, device, num_tokens, context_len))


def test_a_group_larger_than_the_smallest_tile(kernels: Kernels, twin: Kernels, device: torch.device) -> None:
    geometry = Geometry(20, 1, 16, 4)
    actual = attend(kernels, geometry, torch.float32, device, 9, 40)
    assert_close(actual, attend(twin, geometry, torch.float32, device, 9, 40))


def attend_many(
    kernels: Kernels,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    lens: Sequence[int],
    context_lens: Sequence[int],
) -> Tensor:
    g = geometry
    num_blocks = sum(-(-context_len // g.block_size) for context_len in context_lens) + 2
    q = normal((sum(lens), g.num_heads, g.head_dim), dtype, device, 1)
    out = torch.full_like(q, torch.nan)
    chunks = chunks_of(lens, context_lens, tables(g, list(context_lens), num_blocks, device))
    kernels.varlen_chunk_attention(q, kv_pool(g, num_blocks, dtype, device), 1, chunks, g.head_dim**-0.5, out)
    return out


@pytest.mark.parametrize(
    ("lens", "context_lens"),
    [
        ((20, 1, 9), (70, 1, 40)),
        ((1, 0, 5, 0), (33, 7, 5, 0)),
        ((0, 0), (3, 4)),
        ((64, 65, 3), (64, 65, 90)),
        (tuple(1 + i % 3 for i in range(70)), tuple(3 + i % 20 for i in range(70))),  # more than one launch takes
    ],
    ids=lambda lens: f"{len(lens)} of {sum(lens)}",
)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_several_sequences(
    kernels: Kernels,
    twin: Kernels,
    device: torch.device,
    main_dtype: torch.dtype,
    geometry: Geometry,
    lens: tuple[int, ...],
    context_lens: tuple[int, ...],
) -> None:
    actual = attend_many(kernels, geometry, main_dtype, device, lens, context_lens)
    assert_close(actual, attend_many(twin, geometry, main_dtype, device, lens, context_lens))


@pytest.mark.parametrize("num_sms", [1, 24, 500])
def test_several_sequences_in_tiles_of_every_size(twin: Kernels, device: torch.device, num_sms: int) -> None:
    lens, context_lens = (40, 7, 129), (40, 100, 193)
    actual = attend_many(TritonKernels(num_sms), SMALL, torch.bfloat16, device, lens, context_lens)
    assert_close(actual, attend_many(twin, SMALL, torch.bfloat16, device, lens, context_lens))


def test_large_scores_do_not_overflow(kernels: Kernels, twin: Kernels, device: torch.device) -> None:
    actual = attend(kernels, SMALL, torch.float32, device, 40, 90, gain=30.0)
    assert_close(actual, attend(twin, SMALL, torch.float32, device, 40, 90, gain=30.0))


def test_heads_without_a_tile(kernels: Kernels, device: torch.device) -> None:
    with pytest.raises(ValueError, match="heads of 24"):
        attend(kernels, Geometry(2, 2, 24, 4), torch.float32, device, 2, 2)
