"""What wrappers check before a kernel runs. A kernel trusts its arguments, so an id that is out of range must not reach it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def expect(array: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError unless `array` has this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape} and not {shape}")


def check_layer(layer: int, kv_pool: npt.NDArray[Any]) -> None:
    if not 0 <= layer < kv_pool.shape[1]:
        raise IndexError(f"layer {layer} of a pool with {kv_pool.shape[1]}")


def check_slots(slots: npt.NDArray[np.int64], num_slots: int) -> None:
    if slots.size and (slots.min() < 0 or slots.max() >= num_slots):
        raise IndexError(f"slots {slots.min()}..{slots.max()} are not all inside a pool of {num_slots}")


def check_block_ids(block_ids: npt.NDArray[Any], num_blocks: int) -> None:
    if block_ids.size and (block_ids.min() < 0 or block_ids.max() >= num_blocks):
        raise IndexError(f"block ids {block_ids.min()}..{block_ids.max()} are not all inside a pool of {num_blocks} blocks")


def check_rows(places: npt.NDArray[Any], num_rows: int) -> None:
    if places.size and (places.min() < 0 or places.max() >= num_rows):
        raise IndexError(f"rows {places.min()}..{places.max()} are not all among {num_rows}")
