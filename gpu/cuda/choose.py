"""Which set of kernels runs on this machine. Knows that there are several, imports only the one that was chosen."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from gpu.cuda.kernels import Kernels
from gpu.errors import UnknownDevice


def choose_kernels(name: str = "auto") -> Kernels:
    """The set "triton", "numba" or "torch"; "auto": triton where it is installed and can start, else numba.

    The set says in its `name` which one it is. Raises UnknownDevice for a set that cannot run here, or that there is none of.
    """
    match name:
        case "auto":
            try:
                return _triton()
            except UnknownDevice:
                return _numba()
        case "triton":
            return _triton()
        case "numba":
            return _numba()
        case "torch":
            from gpu.cuda.reference import TorchKernels

            return TorchKernels()
    raise UnknownDevice(f"there is no kernel set {name!r}: choose auto, triton, numba or torch")


def _triton() -> Kernels:
    if not find_spec("triton"):
        raise UnknownDevice("the kernel set triton needs the package triton, which CUDA builds of torch bring along")
    if not torch.cuda.is_available():
        raise UnknownDevice("the kernel set triton needs a GPU that torch can use")
    from gpu.cuda import triton

    try:
        triton.start_driver()
    except Exception as error:  # of a compiler, a linker, a driver: whatever it is, there are other kernels
        raise UnknownDevice(f"the kernel set triton cannot start here, is there a C compiler? {error}") from error
    return triton.TritonKernels()


def _numba() -> Kernels:
    if not find_spec("numba"):
        raise UnknownDevice("the kernel set numba needs the package numba")
    from gpu.cuda.kernels.numba_set import NumbaKernels

    return NumbaKernels()
