"""Shapes as the Numba kernels count them: in units of 16 bytes. What does not divide is refused."""

from __future__ import annotations

import torch

from gpu.cuda.kernels.device import UNIT_BYTES, packing


def units_per_row(width: int, dtype: torch.dtype, name: str) -> int:
    """Raises ValueError unless `width` numbers of `dtype` are whole units."""
    per_unit, _, _ = packing(dtype)
    if width % per_unit:
        raise ValueError(f"{name} has rows of {width}, which are not whole {UNIT_BYTES}-byte units of {per_unit}")
    return width // per_unit


def log2(number: int, name: str) -> int:
    """Raises ValueError unless `number` is a power of two."""
    if number < 1 or number & (number - 1):
        raise ValueError(f"{name} is {number}, not a power of two")
    return number.bit_length() - 1


def ceil_pow2(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()
