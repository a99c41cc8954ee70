"""The tests under cases/ say what the Triton kernels compute. They run where Triton can run: in its interpreter, whose switch is
read when triton is imported and which test_interpreter.py therefore starts in a process of its own, and on a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gpu.cuda.kernels import Kernels
from gpu.cuda.reference import TorchKernels

_CASES = Path(__file__).parent / "cases"
_IS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if find_spec("triton") else ["cases/*", "test_*"]  # there is no triton beyond Linux on x86-64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _IS_INTERPRETER:
        for item in items:
            if _CASES in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if _IS_INTERPRETER else "cuda")


@pytest.fixture(scope="session")
def twin() -> Kernels:
    return TorchKernels()


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> Kernels:
    """In the interpreter, cut for a device of few multiprocessors: more would only cut contexts into more programs."""
    from gpu.cuda.triton import TritonKernels

    return TritonKernels(num_sms=8 if device.type == "cpu" else 0)


@pytest.fixture
def main_dtype(device: torch.device) -> torch.dtype:
    """Where one has to do: float32 shows errors, bfloat16 is what a device serves with."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return torch.float32 if request.param == "float32" else torch.bfloat16
