from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest
import torch

from gpu.cuda import choose
from gpu.cuda.choose import choose_kernels
from gpu.errors import UnknownDevice


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def install(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: ModuleSpec(name, None) if name in installed else None)


def test_a_set_says_which_it_is() -> None:
    assert choose_kernels("torch").name == "torch"
    assert choose_kernels("numba").name == "numba"


def test_without_a_gpu_auto_is_numba(no_gpu: None) -> None:
    assert choose_kernels("auto").name == "numba"


@pytest.mark.gpu
def test_with_a_gpu_auto_is_triton() -> None:
    assert choose_kernels().name == "triton"


def test_a_gpu_without_triton_has_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "numba")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_kernels("auto").name == "numba"
    with pytest.raises(UnknownDevice, match="the package triton"):
        choose_kernels("triton")


def test_a_gpu_without_a_compiler_has_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("gpu.cuda.triton.start_driver", fail)
    assert choose_kernels("auto").name == "numba"
    with pytest.raises(UnknownDevice, match="Failed to find C compiler"):
        choose_kernels("triton")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    install(monkeypatch, "triton")
    with pytest.raises(UnknownDevice, match="a GPU"):
        choose_kernels("triton")
    with pytest.raises(UnknownDevice, match="the package numba"):
        choose_kernels("numba")
    with pytest.raises(UnknownDevice, match="choose auto, triton, numba or torch"):
        choose_kernels("cutlass")
