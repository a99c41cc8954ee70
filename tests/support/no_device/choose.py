"""In the place of `gpu.cuda.choose`: the kernels that run anywhere."""

from __future__ import annotations

from gpu.cuda.kernels import Kernels
from gpu.cuda.reference import TorchKernels


def choose_kernels(name: str) -> Kernels:
    return TorchKernels()
