"""chunk_attention, and gather_kv, which is half of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu.cuda.kernels import Kernels
from tests.gpu.cuda.chunks import chunks_of
from tests.gpu.cuda.kernels.cases.inputs import QWEN3_VL_8B, SMALL, assert_close, normal, on_device_too, pool_of, tables_of
from tests.gpu.kernels.paged import Geometry

GEOMETRIES = on_device_too([SMALL, Geometry(3, 1, 32, 16)], [QWEN3_VL_8B])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("num_queries", "context_len"), on_device_too([(0, 3), (1, 1), (1, 17), (8, 8), (7, 16), (5, 9)], [(512, 512), (300, 1111)])
)
def test_chunks(
    kernels: Kernels,
    twin: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    geometry: Geometry,
    num_queries: int,
    context_len: int,
) -> None:
    g = geometry
    q = normal((num_queries, g.num_heads, g.head_dim), dtype, device, 1)
    num_blocks = context_len // g.block_size + 2
    pool, table = pool_of(g, num_blocks, dtype, device), tables_of(g, [context_len], num_blocks, device)[0]
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    kernels.chunk_attention(q, pool, 1, table, context_len, g.head_dim**-0.5, out)
    twin.chunk_attention(q, pool, 1, table, context_len, g.head_dim**-0.5, expected)
    assert_close(out, expected, steps=2)  # torch rounds the weights to bfloat16 as well


def test_chunks_of_several_sequences(kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    lens, context_lens = [5, 0, 1, 8], [9, 4, 1, 17]
    q = normal((sum(lens), SMALL.num_heads, SMALL.head_dim), dtype, device, 1)
    pool = pool_of(SMALL, 12, dtype, device)
    chunks = chunks_of(lens, context_lens, tables_of(SMALL, context_lens, 12, device))
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    kernels.varlen_chunk_attention(q, pool, 1, chunks, 0.25, out)
    twin.varlen_chunk_attention(q, pool, 1, chunks, 0.25, expected)
    assert_close(out, expected, steps=2)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("num_tokens", on_device_too([0, 1, 7, 8, 9, 33], [5000]))
def test_gather(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype, geometry: Geometry, num_tokens: int
) -> None:
    g = geometry
    num_blocks = num_tokens // g.block_size + 2
    pool, table = pool_of(g, num_blocks, dtype, device), tables_of(g, [num_tokens], num_blocks, device)[0]
    found = torch.full((2, 2, g.num_kv_heads, num_tokens, g.head_dim), -1.0, dtype=dtype, device=device)
    kernels.gather_kv(pool, 1, table, num_tokens, found[0, 0], found[0, 1])
    twin.gather_kv(pool, 1, table, num_tokens, found[1, 0], found[1, 1])
    assert torch.equal(found[0], found[1])


def test_tokens_of_a_block_outside_of_the_pool_are_left_alone(
    kernels: Kernels, twin: Kernels, device: torch.device, dtype: torch.dtype
) -> None:
    pool = pool_of(SMALL, 3, dtype, device)
    table = torch.tensor([3, 1, -1, (1 << 31) - 1, 2], dtype=torch.int32, device=device)
    found = torch.full((2, 2, 2, 35, 16), -1.0, dtype=dtype, device=device)
    kernels.gather_kv(pool, 0, table, 35, found[0, 0], found[0, 1])
    twin.gather_kv(pool, 0, table, 35, found[1, 0], found[1, 1])
    assert torch.equal(found[0], found[1])
    assert (found[0, :, :, :8] == -1).all()
    assert (found[0, :, :, 8:16] != -1).all()


def test_what_does_not_fit_is_refused(kernels: Kernels, device: torch.device) -> None:
    pool, q = pool_of(SMALL, 3, torch.float32, device), normal((4, 4, 16), torch.float32, device, 1)
    table = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="17 tokens do not lie in 2 blocks of 8"):
        kernels.chunk_attention(q, pool, 0, table, 17, 1.0, q.clone())
    with pytest.raises(ValueError, match="a context of 3 cannot end with 4 tokens"):
        kernels.chunk_attention(q, pool, 0, table, 3, 1.0, q.clone())
    tables = torch.zeros((2, 2), dtype=torch.int32, device=device)
    for lens, context_lens, words in [
        ((4,), (4,), "2 block tables for 1 sequences"),
        ((1, 2), (4, 4), "3 tokens in chunks, and 4 queries"),
        ((3, 1), (2, 4), "a context of 2 cannot end with 3 tokens"),
        ((3, 1), (3, 17), "17 tokens do not lie in 2 blocks of 8"),
    ]:
        with pytest.raises(ValueError, match=words):
            kernels.varlen_chunk_attention(q, pool, 0, chunks_of(lens, context_lens, tables), 1.0, q.clone())
    wrong = replace(chunks_of((3, 1), (3, 4), tables), spans=torch.zeros((3, 1), dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="spans is"):
        kernels.varlen_chunk_attention(q, pool, 0, wrong, 1.0, q.clone())
    with pytest.raises(ValueError, match="k_out is"):
        kernels.gather_kv(pool, 0, table, 3, q, q)
