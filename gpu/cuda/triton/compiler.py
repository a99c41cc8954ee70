"""triton.jit with a type, and the few device functions that several kernels share. Knows nothing of any one kernel.

What varies from call to call (layer, lengths, counts, where small arrays begin) is never specialised, so that no value of it
compiles a kernel anew; what is fixed for a model (widths, tile sizes) is `tl.constexpr`. Tile sizes come from tables and rules
beside each kernel and not from an autotuner: that would time launches while a server starts or a CUDA graph is captured.

On names: arguments are in capitals where they are part of what is compiled. Arrays are taken to begin at multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


def kernel(*varying: str, small: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """What `triton.jit` makes of a function whose parameters `varying` are numbers that change from call to call.

    `small`: arrays that may begin anywhere, being slices, and of which nobody wants 16 bytes at a time.
    """
    made: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=varying, do_not_specialize_on_alignment=small)
    return made


def inlined(function: Callable[..., Any]) -> Any:
    """A device function."""
    return triton.jit(function)


def start_driver() -> None:
    """Raises what Triton raises on a machine where it cannot launch. To launch, it builds a small library with a C compiler."""
    triton.runtime.driver.active.get_current_target()


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on NumPy arrays: it has no products of bfloat16."""
    return bool(triton.knobs.runtime.interpret)


def power_of_two(number: int) -> int:
    """The smallest that is no less than `number`."""
    return 1 << max(number - 1, 0).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as three products of TF32, as exact as float32. bfloat16 it leaves as it is."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@inlined
def pool_rows(
    table: tl.tensor,
    tokens: tl.tensor,
    wanted: tl.tensor,
    num_blocks: tl.tensor,
    num_layers: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> Any:
    """Where the rows of `tokens` begin, counted in elements from their head's place in block 0.

    An id outside of the pool stands for the nearest block. Only the `wanted` entries of the table are read; None: all.
    """
    if wanted is None:
        ids = tl.load(table + tokens // BLOCK_SIZE)
    else:
        ids = tl.load(table + tokens // BLOCK_SIZE, mask=wanted, other=0)
    ids = tl.minimum(tl.maximum(ids, 0), num_blocks - 1)
    return (ids.to(tl.int64) * num_layers) * LAYER_STRIDE + (tokens % BLOCK_SIZE) * HEAD_DIM


@inlined
def product(left: tl.tensor, right: tl.tensor, sums: tl.tensor, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> Any:
    """sums + left @ right, in float32."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)
