"""gather_blocks and scatter_blocks: whole blocks between a pool and a dense array, for a transfer that needs one run of bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_block_ids, expect
from gpu.kernels.compiler import kernel

Bytes = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


def gather_blocks(pool: Bytes, block_ids: Ids, out: Bytes) -> None:
    """out[i] = pool[block_ids[i]].

    pool: uint8 [num_blocks, block_bytes]; block_ids: int64 [n]; out: uint8 [n, block_bytes]. All contiguous. Raises ValueError
    for shapes, IndexError for ids.
    """
    expect(out, (len(block_ids), pool.shape[1]), "out")
    check_block_ids(block_ids, len(pool))
    _gather_blocks(pool, block_ids, out)


def scatter_blocks(blocks: Bytes, pool: Bytes, block_ids: Ids) -> None:
    """pool[block_ids[i]] = blocks[i]. Types and errors as in gather_blocks; where an id comes twice the later row stays."""
    expect(blocks, (len(block_ids), pool.shape[1]), "blocks")
    check_block_ids(block_ids, len(pool))
    _scatter_blocks(blocks, pool, block_ids)


@kernel("void(uint8[:,::1], int64[::1], uint8[:,::1])")
def _gather_blocks(pool: Bytes, block_ids: Ids, out: Bytes) -> None:
    for row in range(block_ids.shape[0]):
        block = block_ids[row]
        for i in range(pool.shape[1]):
            out[row, i] = pool[block, i]


@kernel("void(uint8[:,::1], uint8[:,::1], int64[::1])")
def _scatter_blocks(blocks: Bytes, pool: Bytes, block_ids: Ids) -> None:
    for row in range(block_ids.shape[0]):
        block = block_ids[row]
        for i in range(pool.shape[1]):
            pool[block, i] = blocks[row, i]
