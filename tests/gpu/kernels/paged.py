"""Random paged sequences for kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_layers: int = 2


GEOMETRIES = [
    Geometry(4, 2, 32, 16),  # the bundled model
    Geometry(16, 8, 128, 16),  # Qwen3-0.6B
    Geometry(1, 1, 8, 1),
    Geometry(3, 3, 20, 4),  # nothing divides by a vector
    Geometry(7, 1, 64, 5),
    Geometry(6, 2, 2, 3),
]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(shape: tuple[int, ...], *seed: int) -> Float:
    return rng(*seed).standard_normal(shape, dtype=np.float32)


def kv_pool(geometry: Geometry, num_blocks: int, *seed: int) -> Float:
    g = geometry
    return normal((num_blocks, g.num_layers, 2, g.num_kv_heads, g.block_size, g.head_dim), *seed)


def scattered_tables(geometry: Geometry, context_lens: list[int], num_blocks: int, *seed: int) -> npt.NDArray[np.int32]:
    """Block tables of distinct blocks in no order; entries that no context reaches name no block at all."""
    used = [-(-length // geometry.block_size) for length in context_lens]
    tables = np.full((len(context_lens), max([*used, 1]) + 1), 1 << 30, np.int32)
    free = rng(*seed).permutation(num_blocks).tolist()
    for row, count in zip(tables, used, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    return tables
