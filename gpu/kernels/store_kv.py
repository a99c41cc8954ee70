"""store_kv: the keys and values of a step's new tokens, into their slots of the pool."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_layer, check_slots, expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]


def store_kv(k: Float, v: Float, kv_pool: Float, layer: int, slots: npt.NDArray[np.int64]) -> None:
    """Write row i of `k` and `v` to slot slots[i] = block_id * block_size + offset of one layer.

    k, v: float32 [num_tokens, num_kv_heads, head_dim]; kv_pool: float32 [num_blocks, num_layers, 2, num_kv_heads, block_size,
    head_dim]; slots: int64 [num_tokens]. All contiguous. Raises ValueError for shapes that do not fit together, IndexError for a
    slot or layer outside of the pool, TypeError for other dtypes or strided arrays.
    """
    num_blocks, _, _, num_kv_heads, block_size, head_dim = kv_pool.shape
    expect(k, (len(slots), num_kv_heads, head_dim), "k")
    expect(v, k.shape, "v")
    check_layer(layer, kv_pool)
    check_slots(slots, num_blocks * block_size)
    _store_kv(k, v, kv_pool, layer, slots)


@kernel("void(float32[:,:,::1], float32[:,:,::1], float32[:,:,:,:,:,::1], int64, int64[::1])")
def _store_kv(k: Float, v: Float, kv_pool: Float, layer: int, slots: npt.NDArray[np.int64]) -> None:
    block_size = kv_pool.shape[4]
    for token in range(slots.shape[0]):
        block = slots[token] // block_size
        offset = slots[token] - block * block_size
        for head in range(k.shape[1]):
            for i in range(k.shape[2]):
                kv_pool[block, layer, 0, head, offset, i] = k[token, head, i]
                kv_pool[block, layer, 1, head, offset, i] = v[token, head, i]
