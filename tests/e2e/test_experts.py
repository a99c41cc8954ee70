"""A model with experts, end to end: its tokens are those of transformers, and do not depend on where they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import uvloop

import gpu.cuda.backend
from gpu.cuda.backend import CudaBackend
from gpu.cuda.kernels.experts import experts
from gpu.cuda.processes import ProcessId
from gpu.cuda.reference import TorchKernels
from tests.e2e.mix import Said, ask_at_once, cases
from tests.e2e.test_same_tokens import TIGHT, Greedy, check, greedy_cases
from tests.gpu.cuda.fake_driver import FakeDriver, FakeProcesses
from tests.support.cluster import ALL_ROLES, APART, node_cluster
from tests.support.experts import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def wanted(model: Path) -> tuple[Said, ...]:
    async def ask() -> list[Said]:
        async with node_cluster((ALL_ROLES,), "--model", str(model), "--served-model-name", "tiny-vl") as alone:
            return await ask_at_once(alone.url, cases())

    return tuple(uvloop.run(ask()))


def test_greedy_output_is_that_of_transformers(model: Path, wanted: Sequence[Said], undisturbed: Sequence[Said]) -> None:
    reference = Greedy(model)
    for case, said in greedy_cases(wanted):
        assert said.choices[0].text == reference.text(case.body), case.name
    assert wanted != undisturbed


@pytest.mark.parametrize("options", [("--max-chunk-tokens", "16"), (*TIGHT, "--transfer", "socket")], ids=" ".join)
async def test_nodes_apart(model: Path, wanted: Sequence[Said], options: Sequence[str]) -> None:
    async with node_cluster(APART, "--model", str(model), "--served-model-name", "tiny-vl", *options) as cluster:
        check(await ask_at_once(cluster.url, cases()), wanted, cases())
        await cluster.idle()


class Kernels(TorchKernels):
    """With what a device without Triton does about experts; the twin's takes one row after the other."""

    experts = staticmethod(experts)


async def test_the_way_through_a_device(model: Path, wanted: Sequence[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def open_cuda(index: int) -> CudaBackend:
        processes = FakeProcesses(ProcessId(pid=100, started=1))
        return CudaBackend(FakeDriver(total_bytes=8 << 30), Kernels(), dtype=torch.float32, processes=processes)

    monkeypatch.setattr(gpu.cuda.backend, "open_cuda", open_cuda)
    options = ("--device", "cuda", "--kv-mib", "64", "--embedding-mib", "8")
    async with node_cluster((ALL_ROLES,), "--model", str(model), "--served-model-name", "tiny-vl", *options) as cluster:
        check(await ask_at_once(cluster.url, cases()), wanted, cases())
        await cluster.idle()
