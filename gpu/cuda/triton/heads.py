"""What the attention kernels ask of a head."""

from __future__ import annotations

_MIN_HEAD_DIM = 16  # a tensor core's step along what is summed over


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless tiles of tensor cores can be made of such heads."""
    if head_dim < _MIN_HEAD_DIM or head_dim & (head_dim - 1):
        raise ValueError(f"heads of {head_dim} are no power of two of at least {_MIN_HEAD_DIM}: use the kernel set numba")
