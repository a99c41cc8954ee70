"""The kernels in Triton, one file each: the fast set, for GPUs of compute capability 8 and up. Tuned for Hopper."""

from __future__ import annotations

from gpu.cuda.triton.compiler import start_driver
from gpu.cuda.triton.kernel_set import TritonKernels

__all__ = ["TritonKernels", "start_driver"]
