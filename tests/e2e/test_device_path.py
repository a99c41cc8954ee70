"""The way through a CUDA device, held without one: real stages, schedulers, runners, graphs' bookkeeping, pools and handles over
a driver whose device memory is the host's, and kernels in plain torch. What it says must be what the CPU says.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch

import gpu.cuda.backend
from gpu.cuda.backend import CudaBackend
from gpu.cuda.processes import ProcessId
from gpu.cuda.reference import TorchKernels
from tests.e2e.mix import Said
from tests.e2e.test_same_tokens import TIGHT, check_cold_and_warm, rungs
from tests.gpu.cuda.fake_driver import FakeDriver, FakeProcesses
from tests.support.cluster import ALL_ROLES, APART, node_cluster

ROOMY = ("--kv-mib", "64", "--embedding-mib", "8")


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDriver]]:
    """Every node is a process of its own to its device. At the end nothing is left of any."""
    drivers: list[FakeDriver] = []
    numbers = itertools.count(100)

    def open_cuda(index: int) -> CudaBackend:
        drivers.append(FakeDriver(total_bytes=8 << 30))
        processes = FakeProcesses(ProcessId(pid=next(numbers), started=1))
        return CudaBackend(drivers[-1], TorchKernels(), dtype=torch.float32, processes=processes)

    monkeypatch.setattr(gpu.cuda.backend, "open_cuda", open_cuda)
    yield drivers
    assert drivers
    gc.collect()  # memory goes with the last tensor over it, and runners refer to themselves
    assert [driver.left() for driver in drivers] == [{}] * len(drivers)


@pytest.mark.parametrize("options", [(*ROOMY, "--block-size", "8", "--max-chunk-tokens", "16"), TIGHT], ids=" ".join)
async def test_one_process(undisturbed: Sequence[Said], options: Sequence[str]) -> None:
    async with node_cluster((ALL_ROLES,), "--device", "cuda", *options) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed, is_roomy=options is not TIGHT)
        await cluster.idle()


@pytest.mark.parametrize(
    ("rung", "options"),
    [("mapped", ROOMY), ("mapped", (*TIGHT, "--max-chunk-tokens", "16")), ("socket", (*ROOMY, "--transfer", "socket"))],
)
async def test_nodes_apart(undisturbed: Sequence[Said], rung: str, options: Sequence[str]) -> None:
    async with node_cluster(APART, "--device", "cuda", *options) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed)
        await cluster.idle()
        assert await rungs(cluster) == {("prefill", rung), ("decode", rung)}
