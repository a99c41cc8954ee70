"""The twins against what is known without them: the CPU kernels' NumPy reference, hand-computed numbers, and each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu.cuda.kernels import Kernels
from gpu.cuda.reference import TorchKernels, sum64_rows
from gpu.kernels import reference as cpu
from tests.gpu.cuda.chunks import chunks_of

TWIN: Kernels = TorchKernels()
MASK = (1 << 64) - 1


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: npt.NDArray[np.float32]) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=2e-6)


def test_norms() -> None:
    x, delta, weight = normal(3, 24), normal(3, 24, seed=1), normal(24, seed=2)
    out, expected = torch.empty_like(x), np.empty((3, 24), np.float32)
    TWIN.rms_norm(x, weight, 1e-6, out)
    cpu.rms_norm(x.numpy(), weight.numpy(), 1e-6, expected)
    close(out, expected)
    summed = x.numpy() + delta.numpy()
    TWIN.add_rms_norm(delta, x, weight, 1e-6, out)
    cpu.rms_norm(summed, weight.numpy(), 1e-6, expected)
    np.testing.assert_array_equal(x.numpy(), summed)
    close(out, expected)


def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    x, delta, weight = normal(5, 64).bfloat16(), normal(5, 64, seed=1).bfloat16(), torch.ones(64).bfloat16()
    out, again = torch.empty_like(x), torch.empty_like(x)
    TWIN.add_rms_norm(delta, x, weight, 1e-6, out)
    TWIN.rms_norm(x, weight, 1e-6, again)
    assert torch.equal(out, again)


def test_silu_mul() -> None:
    gate_up, out, expected = normal(3, 16), torch.empty(3, 8), np.empty((3, 8), np.float32)
    TWIN.silu_mul(gate_up, out)
    cpu.silu_mul(gate_up.numpy(), expected)
    close(out, expected)


@pytest.mark.parametrize("normalizes", [False, True], ids=["", "normalizes"])
def test_experts(normalizes: bool) -> None:
    x, logits, gate_up, down = normal(5, 12), normal(5, 6, seed=1), normal(6, 16, 12, seed=2), normal(6, 12, 8, seed=3)
    chosen, shares = np.empty((5, 3), np.int64), np.empty((5, 3), np.float32)
    cpu.choose_experts(logits.numpy(), normalizes, chosen, shares)
    parts = np.empty((15, 12), np.float32)
    for place, expert in enumerate(chosen.ravel()):
        inner = np.empty((1, 8), np.float32)
        cpu.silu_mul(x.numpy()[place // 3 : place // 3 + 1] @ gate_up[expert].numpy().T, inner)
        parts[place] = (inner @ down[expert].numpy().T)[0]
    out, expected = torch.empty_like(x), np.empty((5, 12), np.float32)
    cpu.mix_rows(parts, np.arange(15).reshape(5, 3), shares, expected)
    TWIN.experts(x, logits, gate_up, down, 3, normalizes, out)
    close(out, expected)


def test_rope_store_and_what_it_leaves_alone() -> None:
    num_tokens, num_heads, num_kv_heads, head_dim, block_size = 5, 4, 2, 8, 4
    qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    q_norm, k_norm = normal(head_dim, seed=1), normal(head_dim, seed=2)
    angles = normal(num_tokens, head_dim // 2, seed=3)
    pool = normal(3, 2, 2, num_kv_heads, block_size, head_dim, seed=4)
    slots = torch.tensor([7, -1, 0, 3 * block_size, 10])
    expected_pool, stored = pool.numpy().copy(), [0, 2, 4]
    q_out, expected_q = torch.empty(num_tokens, num_heads, head_dim), np.empty((num_tokens, num_heads, head_dim), np.float32)
    TWIN.rope_store(qkv, q_norm, k_norm, 1e-6, angles.cos(), angles.sin(), pool, 1, slots, q_out)
    for token in range(num_tokens):
        one, here = slice(token, token + 1), slots.numpy()[token : token + 1]
        q, qw, kw, cos, sin = (x.numpy() for x in (qkv[one], q_norm, k_norm, angles[one].cos(), angles[one].sin()))
        into = expected_pool if token in stored else expected_pool.copy()
        slot = here if token in stored else np.zeros(1, np.int64)
        cpu.rope_store(q, qw, kw, 1e-6, cos, sin, into, 1, slot, expected_q[one])
    close(q_out, expected_q)
    close(pool, expected_pool)


@pytest.mark.parametrize("context_lens", [[0, 1, 9], [8, 7]])
def test_paged_attention(context_lens: list[int]) -> None:
    pool, q = normal(7, 2, 2, 2, 4, 8), normal(len(context_lens), 6, 8, seed=1)
    tables = torch.tensor([[5, 1, 3], [6, 0, 2], [4, 2, 6]][: len(context_lens)], dtype=torch.int32)
    out, expected = torch.full_like(q, torch.nan), np.empty(tuple(q.shape), np.float32)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    TWIN.paged_attention(q, pool, 1, tables, lens, 0.3, out, torch.empty(0))
    cpu.paged_attention(q.numpy(), pool.numpy(), 1, tables.numpy(), lens.numpy(), 0.3, expected)
    close(out, expected)


@pytest.mark.parametrize(("num_tokens", "context_len"), [(1, 1), (5, 5), (3, 9), (0, 4)])
def test_chunk_attention(num_tokens: int, context_len: int) -> None:
    pool, q = normal(7, 2, 2, 2, 4, 8), normal(num_tokens, 6, 8, seed=1)
    table = torch.tensor([5, 1, 3], dtype=torch.int32)
    out, expected = torch.full_like(q, torch.nan), np.empty(tuple(q.shape), np.float32)
    TWIN.chunk_attention(q, pool, 0, table, context_len, 0.3, out)
    cpu.chunk_attention(q.numpy(), pool.numpy(), 0, table.numpy(), context_len, 0.3, expected)
    close(out, expected)


def test_varlen_chunk_attention() -> None:
    pool, q = normal(7, 2, 2, 2, 4, 8), normal(6, 6, 8, seed=1)
    tables = torch.tensor([[5, 1, 3], [6, 0, 2], [4, 2, 6]], dtype=torch.int32)
    out, expected = torch.full_like(q, torch.nan), np.empty(tuple(q.shape), np.float32)
    TWIN.varlen_chunk_attention(q, pool, 0, chunks_of((3, 1, 2), (9, 1, 2), tables), 0.3, out)
    for i, (start, end, context_len) in enumerate([(0, 3, 9), (3, 4, 1), (4, 6, 2)]):
        arrays = q[start:end].numpy(), pool.numpy(), 0, tables[i].numpy(), context_len, 0.3, expected[start:end]
        cpu.chunk_attention(*arrays)
    close(out, expected)


def test_gather_kv() -> None:
    pool, table = normal(7, 2, 2, 2, 4, 8), torch.tensor([5, 1, 7, 3], dtype=torch.int32)
    k, v = torch.zeros(2, 13, 8), torch.zeros(2, 13, 8)
    TWIN.gather_kv(pool, 1, table, 13, k, v)
    expected_k, expected_v = np.zeros((2, 13, 8), np.float32), np.zeros((2, 13, 8), np.float32)
    for token in [*range(8), 12]:  # the third block is outside of the pool
        expected_k[:, token] = pool[table[token // 4], 1, 0, :, token % 4].numpy()
        expected_v[:, token] = pool[table[token // 4], 1, 1, :, token % 4].numpy()
    close(k, expected_k)
    close(v, expected_v)


def sum64_by_definition(block: bytes) -> int:
    total = 0
    for i in range(len(block) // 8):
        z = int.from_bytes(block[8 * i : 8 * i + 8], "little") ^ ((i + 1) * 0x9E3779B97F4A7C15 & MASK)
        for _ in range(2):
            z ^= z >> 32
            z = z * 0xD6E8FEB86659FD93 & MASK
        total += z ^ (z >> 32)
    return total & MASK


def test_blocks_and_their_sums() -> None:
    src = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 48), np.uint8))
    dst, sums = torch.zeros(5, 48, dtype=torch.uint8), torch.full((4,), 7)
    TWIN.copy_blocks(src, torch.tensor([5, 0, 6, 2]), dst, torch.tensor([1, 4, 0, -1]), sums)
    assert torch.equal(dst[1], src[5])
    assert torch.equal(dst[4], src[0])
    assert not dst[[0, 2, 3]].any()
    expected = [sum64_by_definition(src[i].numpy().tobytes()) for i in (5, 0)]
    assert sums.numpy().view(np.uint64).tolist() == [*expected, 0, 0]
    TWIN.hash_blocks(src, torch.tensor([0, 5, -1, 2]), sums)
    expected = [expected[1], expected[0], 0, int(sum64_rows(src[2:3].numpy())[0])]
    assert sums.numpy().view(np.uint64).tolist() == expected
    assert expected[3] == sum64_by_definition(src[2].numpy().tobytes())


def test_a_sum_knows_the_order_of_words() -> None:
    block = np.arange(64, dtype=np.uint8)[None]
    turned = block.copy()
    turned[0, :8], turned[0, 8:16] = block[0, 8:16], block[0, :8]
    assert sum64_rows(block) != sum64_rows(turned)


def test_what_does_not_fit_is_refused() -> None:
    pool, q, out = normal(2, 1, 2, 2, 4, 8), normal(1, 4, 8), torch.empty(1, 4, 8)
    table = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IndexError, match="layer 1"):
        TWIN.chunk_attention(q, pool, 1, table, 1, 1.0, out)
    with pytest.raises(ValueError, match="5 tokens do not lie in 1 blocks of 4"):
        TWIN.chunk_attention(q, pool, 0, table, 5, 1.0, out)
    with pytest.raises(TypeError, match=r"block_table is torch\.int64"):
        TWIN.chunk_attention(q, pool, 0, table.long(), 1, 1.0, out)
    with pytest.raises(ValueError, match="do not divide"):
        TWIN.chunk_attention(normal(1, 3, 8), pool, 0, table, 1, 1.0, torch.empty(1, 3, 8))
    with pytest.raises(ValueError, match="not contiguous"):
        TWIN.rms_norm(normal(8, 4).T, torch.ones(8), 1e-6, torch.empty(4, 8))
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16"):
        TWIN.rms_norm(normal(4, 8), torch.ones(8).bfloat16(), 1e-6, torch.empty(4, 8))
    with pytest.raises(ValueError, match="no multiple of 16"):
        TWIN.hash_blocks(torch.zeros(2, 24, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), torch.zeros(1).long())
