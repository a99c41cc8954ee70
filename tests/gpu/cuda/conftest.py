from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu.cuda.backend import CudaBackend, open_cuda


@pytest.fixture
def cuda_backend() -> Iterator[CudaBackend]:
    """A real device. Tests that ask for it are marked `gpu`, and are not there on a machine without one."""
    backend = open_cuda(0)
    yield backend
    backend.close()
