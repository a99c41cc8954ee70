"""Where the model of a test runs: on CPU tensors with the kernels' twins, and on the GPU where `-m gpu` asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from gpu.cuda.reference import TorchKernels
from tests.model.device.engine import DeviceEngine, Target
from tests.model.reference import Model

_NOT_FOR_A_GPU = {"vl-no-deepstack"}  # whose heads are no power of two wide


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A GPU's kernels are not made for every model that the CPU's run."""
    unfit = [item for item in items if isinstance(item, pytest.Function) and _is_unfit(item)]
    if unfit:
        config.hook.pytest_deselected(items=unfit)
        items[:] = [item for item in items if item not in set(unfit)]


def _is_unfit(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    on_gpu = "cuda" in (params.get("target"), params.get("half_target"))
    return on_gpu and params.get("name") in _NOT_FOR_A_GPU


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Target:
    """float32, so that what is computed can be told from what is rounded."""
    return make_target(request.param, torch.float32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def half_target(request: pytest.FixtureRequest) -> Target:
    """bfloat16, as a GPU serves."""
    return make_target(request.param, torch.bfloat16)


@pytest.fixture
def open_engine(target: Target) -> Iterator[Callable[..., DeviceEngine]]:
    """Makes engines and closes them after the test."""
    engines: list[DeviceEngine] = []

    def make(model: Model, **options: object) -> DeviceEngine:
        engines.append(DeviceEngine(model, options.pop("target", target), **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def make_target(name: str, dtype: torch.dtype) -> Target:
    if name == "cpu":
        return Target(torch.device("cpu"), dtype, TorchKernels())
    from gpu.cuda.choose import choose_kernels

    return Target(torch.device("cuda", 0), dtype, choose_kernels("auto"))
