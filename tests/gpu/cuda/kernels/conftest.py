"""The tests under cases/ say what the Numba kernels compute. They run where those can run: in Numba's CUDA simulator, whose
switch is read when numba is imported and which test_simulator.py therefore starts in a process of its own, and on a GPU."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gpu.cuda.kernels import Kernels
from gpu.cuda.kernels.device import SIMULATED
from gpu.cuda.kernels.numba_set import NumbaKernels
from gpu.cuda.reference import TorchKernels

_CASES = Path(__file__).parent / "cases"

# What compiles for a device is an extra, numba-cuda, that the simulator does without.
collect_ignore = [] if find_spec("numba_cuda") and not SIMULATED else ["test_compiled.py"]

if SIMULATED:
    sys.setswitchinterval(1e-4)  # its threads wait for each other all the time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SIMULATED:
        for item in items:
            if _CASES in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if SIMULATED else "cuda")


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return NumbaKernels()


@pytest.fixture(scope="session")
def twin() -> Kernels:
    return TorchKernels()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return torch.float32 if request.param == "float32" else torch.bfloat16
