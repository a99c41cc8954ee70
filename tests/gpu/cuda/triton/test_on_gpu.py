"""What only a GPU can show: the 8B model's sizes, contexts of thousands of tokens, and launches that are captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Geometry, Kernels
from gpu.cuda.reference import TorchFusedLinear, sum64_rows
from gpu.cuda.triton.fused_linear import TritonFusedLinear
from tests.gpu.cuda.chunks import chunks_of
from tests.gpu.cuda.triton.cases.inputs import QWEN3_VL_8B, assert_close

pytestmark = pytest.mark.gpu

G = QWEN3_VL_8B
SCALE = G.head_dim**-0.5
NUM_BLOCKS = 2048
GEOMETRY = Geometry(
    dtype=torch.bfloat16,
    hidden_size=4096,
    intermediate_size=12288,
    num_heads=G.num_heads,
    num_kv_heads=G.num_kv_heads,
    head_dim=G.head_dim,
    block_size=G.block_size,
)


@pytest.fixture(scope="module")
def pool(device: torch.device) -> Tensor:
    """[NUM_BLOCKS, layers, 2, num_kv_heads, block_size, head_dim], 4.8 GB."""
    torch.manual_seed(1)
    shape = (NUM_BLOCKS, G.num_layers, 2, G.num_kv_heads, G.block_size, G.head_dim)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()


def queries(num_rows: int, device: torch.device) -> Tensor:
    torch.manual_seed(2)
    return torch.randn((num_rows, G.num_heads, G.head_dim), dtype=torch.bfloat16, device=device)


def block_tables(num_seqs: int, num_blocks: int, device: torch.device) -> Tensor:
    """Sequences share blocks where there are not enough: attention only reads."""
    torch.manual_seed(3)
    return torch.stack([torch.randperm(NUM_BLOCKS, device=device)[:num_blocks] for _ in range(num_seqs)]).int()


@pytest.mark.parametrize("num_seqs", [1, 7, 33, 64, 200])
def test_decode_over_contexts_of_all_lengths(
    kernels: Kernels, twin: Kernels, device: torch.device, pool: Tensor, num_seqs: int
) -> None:
    q, tables = queries(num_seqs, device), block_tables(num_seqs, 512, device)
    lens = torch.randint(0, 8193, (num_seqs,), device=device).int()
    lens[0] = 8192
    workspace = torch.full(
        (kernels.workspace_floats(num_seqs, G.num_heads, G.num_kv_heads, G.head_dim),), torch.nan, device=device
    )
    out, expected = torch.full_like(q, torch.nan), torch.empty_like(q)
    kernels.paged_attention(q, pool, 35, tables, lens, SCALE, out, workspace)
    twin.paged_attention(q, pool, 35, tables, lens, SCALE, expected, workspace)
    assert_close(out, expected)


@pytest.mark.parametrize(("num_tokens", "context_len"), [(8192, 8192), (2048, 7001), (500, 8000), (100, 4000), (1, 8192)])
def test_chunks_of_a_long_prompt(
    kernels: Kernels, twin: Kernels, device: torch.device, pool: Tensor, num_tokens: int, context_len: int
) -> None:
    q, table = queries(num_tokens, device), block_tables(1, 512, device)[0]
    out = torch.full_like(q, torch.nan)
    kernels.chunk_attention(q, pool, 35, table, context_len, SCALE, out)
    for start in range(0, num_tokens, 512):  # the twin keeps all scores
        part = q[start : start + 512]
        expected = torch.empty_like(part)
        twin.chunk_attention(part, pool, 35, table, context_len - num_tokens + start + len(part), SCALE, expected)
        assert_close(out[start : start + 512], expected)


def test_chunks_of_many_prompts(kernels: Kernels, twin: Kernels, device: torch.device, pool: Tensor) -> None:
    """More than one launch takes, long ones among short ones."""
    lens = [1 + 37 * i % 150 for i in range(70)]
    context_lens = [num_tokens + 611 * i % 900 for i, num_tokens in enumerate(lens)]
    q = queries(sum(lens), device)
    chunks = chunks_of(lens, context_lens, block_tables(70, 512, device))
    out, expected = torch.full_like(q, torch.nan), torch.empty_like(q)
    kernels.varlen_chunk_attention(q, pool, 35, chunks, SCALE, out)
    twin.varlen_chunk_attention(q, pool, 35, chunks, SCALE, expected)
    assert_close(out, expected)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_linear_layers_of_a_few_rows(device: torch.device, num_rows: int) -> None:
    fused, twin = TritonFusedLinear(), TorchFusedLinear()
    torch.manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    x, norm, out, width = random(num_rows, 4096), random(4096), random(num_rows, 4096), 4096**-0.5
    made, expected = torch.empty(2, num_rows, 6144, dtype=torch.bfloat16, device=device)
    weight = width * random(6144, 4096)
    fused.norm_linear(x, norm, 1e-6, weight, made)
    twin.norm_linear(x, norm, 1e-6, weight, expected)
    assert_close(made, expected)
    inner, expected = torch.empty(2, num_rows, 12288, dtype=torch.bfloat16, device=device)
    weight = width * random(2 * 12288, 4096)
    fused.norm_silu_mul(x, norm, 1e-6, weight, inner)
    twin.norm_silu_mul(x, norm, 1e-6, weight, expected)
    assert_close(inner, expected)
    weight, expected = 12288**-0.5 * random(4096, 12288), out.clone()
    fused.linear_add(inner, weight, out)
    twin.linear_add(inner, weight, expected)
    assert_close(out, expected)


def test_blocks_of_two_megabytes(kernels: Kernels, device: torch.device, pool: Tensor) -> None:
    src = pool.view(torch.uint8).view(NUM_BLOCKS, -1)
    dst = torch.zeros((300, src.shape[1]), dtype=torch.uint8, device=device)
    src_ids, dst_ids = torch.randperm(NUM_BLOCKS, device=device)[:250], torch.randperm(300, device=device)[:250]
    sums, again = torch.zeros_like(src_ids), torch.zeros_like(src_ids)
    kernels.copy_blocks(src, src_ids, dst, dst_ids, sums)
    assert torch.equal(dst[dst_ids], src[src_ids])
    kernels.hash_blocks(dst, dst_ids, again)
    assert torch.equal(sums, again)
    assert sums[:3].cpu().numpy().view("u8").tolist() == sum64_rows(src[src_ids[:3]].cpu().numpy()).tolist()


def test_a_captured_step_follows_its_inputs(kernels: Kernels, twin: Kernels, device: torch.device, pool: Tensor) -> None:
    kernels.warm_up(GEOMETRY, device)
    num_seqs = 16
    q, tables = queries(num_seqs, device), block_tables(num_seqs, 512, device)
    lens = torch.zeros(num_seqs, dtype=torch.int32, device=device)
    workspace = torch.empty(kernels.workspace_floats(num_seqs, G.num_heads, G.num_kv_heads, G.head_dim), device=device)
    x = torch.randn((num_seqs, 4096), dtype=torch.bfloat16, device=device)
    delta, weight, normed = torch.randn_like(x), torch.randn_like(x[0]), torch.empty_like(x)
    out, expected = torch.empty_like(q), torch.empty_like(q)
    sums, ids = torch.zeros(4, dtype=torch.int64, device=device), torch.arange(4, device=device)
    blocks = pool.view(torch.uint8).view(NUM_BLOCKS, -1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.add_rms_norm(delta, x, weight, 1e-6, normed)
        kernels.paged_attention(q, pool, 1, tables, lens, SCALE, out, workspace)
        kernels.hash_blocks(blocks, ids, sums)
    for longest in (1, 700, 8192):
        lens.copy_(torch.randint(0, longest + 1, (num_seqs,), device=device))
        q.normal_()
        ids.copy_(torch.randperm(NUM_BLOCKS, device=device)[:4])
        before, expected_normed = x.clone(), torch.empty_like(x)
        graph.replay()
        twin.add_rms_norm(delta, before, weight, 1e-6, expected_normed)
        twin.paged_attention(q, pool, 1, tables, lens, SCALE, expected, workspace)
        assert_close(out, expected)
        assert_close(normed, expected_normed)
        assert sums[0].item() == sum64_rows(blocks[ids[:1]].cpu().numpy()).view("i8")[0]
