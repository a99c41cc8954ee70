"""What only a device can show: kernels run on torch's current stream, allocate nothing, and can be captured in a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu.cuda.kernels import Geometry, Kernels

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(
    dtype=torch.bfloat16,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
)
NUM_SEQS, NUM_BLOCKS = 4, 64


class Step:
    """What one layer of a decode step launches, on tensors that stay where they are."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        g = GEOMETRY

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(g.dtype)

        self.kernels = kernels
        self.x, self.delta, self.weight = normal(NUM_SEQS, g.hidden_size), normal(NUM_SEQS, g.hidden_size), normal(g.hidden_size)
        self.gate_up, self.gated = normal(NUM_SEQS, 2 * g.intermediate_size), normal(NUM_SEQS, g.intermediate_size)
        self.qkv = normal(NUM_SEQS, (g.num_heads + 2 * g.num_kv_heads) * g.head_dim)
        self.norm, self.pool = normal(g.head_dim), normal(NUM_BLOCKS, 2, 2, g.num_kv_heads, g.block_size, g.head_dim)
        self.angles = torch.randn((NUM_SEQS, g.head_dim // 2), device=device)
        self.slots = torch.tensor([0, 300, -1, 900], device=device)
        self.q, self.out = normal(NUM_SEQS, g.num_heads, g.head_dim), normal(NUM_SEQS, g.num_heads, g.head_dim)
        self.tables = torch.randperm(NUM_BLOCKS, device=device).to(torch.int32).view(NUM_SEQS, -1)
        self.lens = torch.tensor([0, 17, 100, 256], dtype=torch.int32, device=device)
        floats = kernels.workspace_floats(NUM_SEQS, g.num_heads, g.num_kv_heads, g.head_dim)
        self.workspace = torch.empty(floats, device=device)
        self.blocks = self.pool.view(torch.uint8).view(NUM_BLOCKS, -1)
        self.copies, self.ids = torch.zeros_like(self.blocks), torch.tensor([3, 1, 60], device=device)
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)

    def run(self) -> None:
        k = self.kernels
        k.add_rms_norm(self.delta, self.x, self.weight, 1e-6, self.delta)
        k.rms_norm(self.delta, self.weight, 1e-6, self.delta)
        k.silu_mul(self.gate_up, self.gated)
        k.rope_store(self.qkv, self.norm, self.norm, 1e-6, self.angles, self.angles, self.pool, 1, self.slots, self.q)
        k.paged_attention(self.q, self.pool, 1, self.tables, self.lens, 0.09, self.out, self.workspace)
        k.copy_blocks(self.blocks, self.ids, self.copies, self.ids, self.sums)

    def results(self) -> list[Tensor]:
        return [each.clone() for each in (self.x, self.delta, self.gated, self.pool, self.q, self.out, self.copies, self.sums)]


@pytest.fixture
def step(kernels: Kernels, device: torch.device) -> Step:
    torch.manual_seed(0)
    return Step(kernels, device)


def expect_after_waiting(step: Step, run: Callable[[], object], expected: list[Tensor]) -> None:
    run()
    torch.cuda.synchronize()
    assert all(torch.equal(found, wanted) for found, wanted in zip(step.results(), expected, strict=True))


@pytest.fixture
def expected(kernels: Kernels, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    other = Step(kernels, device)
    other.run()
    torch.cuda.synchronize()
    return other.results()


def test_a_captured_graph_does_the_same(kernels: Kernels, device: torch.device, expected: list[Tensor]) -> None:
    torch.manual_seed(0)
    step = Step(kernels, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()  # captured, not run
    expect_after_waiting(step, graph.replay, expected)


def test_a_replay_sees_the_lengths_and_tables_of_its_time(kernels: Kernels, twin: Kernels, step: Step) -> None:
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    step.lens.copy_(torch.tensor([256, 1, 0, 33], dtype=torch.int32))
    step.tables.copy_(step.tables.flip(0))
    graph.replay()
    wanted = torch.empty_like(step.out)
    twin.paged_attention(step.q, step.pool, 1, step.tables, step.lens, 0.09, wanted, step.workspace)
    torch.testing.assert_close(step.out, wanted, rtol=2**-7, atol=2**-10)


def test_it_runs_on_the_current_stream(step: Step, expected: list[Tensor]) -> None:
    """On another stream than that which still holds the input back, it would be too early."""
    stream = torch.cuda.Stream()
    qkv = step.qkv.clone()
    step.qkv.zero_()
    torch.cuda.synchronize()

    def run() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # clock cycles of the device
            step.qkv.copy_(qkv)
            step.run()

    expect_after_waiting(step, run, expected)


def test_nothing_is_allocated(step: Step) -> None:
    step.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_warm_up(kernels: Kernels, device: torch.device) -> None:
    kernels.warm_up(GEOMETRY, device)
    kernels.warm_up(replace(GEOMETRY, has_qk_norm=False), device)
