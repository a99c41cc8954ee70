"""copy_blocks and hash_blocks: whole blocks and their sum64 in one pass.

Blocks are cut into chunks, one program each, so that few large blocks fill the device as well as many small ones. A chunk's sum
is added to its block's with one atomic addition; additions modulo 2^64 come to the same in any order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gpu.cuda.kernels.checks import check_copy_blocks, check_hash_blocks
from gpu.cuda.triton.compiler import inlined, kernel

_WIDTH = 512  # words of 8 bytes that 256 threads move at a time
_ROUNDS = 8  # loads of 16 bytes that each thread has in flight


def copy_blocks(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_copy_blocks(src, src_ids, dst, dst_ids, sums)
    _launch(src, src_ids, dst, dst_ids, sums, stores=True)


def hash_blocks(src: Tensor, ids: Tensor, sums: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`."""
    check_hash_blocks(src, ids, sums)
    _launch(src, ids, src, ids, sums, stores=False)


def _launch(src: Tensor, src_ids: Tensor, dst: Tensor, dst_ids: Tensor, sums: Tensor | None, *, stores: bool) -> None:
    num_pairs = src.shape[1] // 16
    if sums is not None:
        sums.zero_()
    if not len(src_ids) or not num_pairs:
        return
    num_chunks = -(-num_pairs // (_WIDTH * _ROUNDS // 2))
    _copy_chunks[(len(src_ids) * num_chunks,)](
        src.view(torch.int64),
        src_ids,
        len(src),
        dst.view(torch.int64),
        dst_ids,
        len(dst),
        src_ids if sums is None else sums,
        num_pairs,
        num_chunks,
        WIDTH=_WIDTH,
        ROUNDS=_ROUNDS,
        STORES=stores,
        SUMS=sums is not None,
        num_warps=8,
    )


@inlined
def _mixed(words: tl.tensor, keys: tl.tensor) -> Any:
    """What words add to their block's sum64, see `gpu.cuda.reference.sum64_rows`."""
    z = words ^ keys
    z = (z ^ (z >> 32)) * 0xD6E8FEB86659FD93
    z = (z ^ (z >> 32)) * 0xD6E8FEB86659FD93
    return z ^ (z >> 32)


@inlined
def _key(number: tl.tensor) -> Any:
    """What word number 1, 2, ... of a block is xored with, or a part of it: a sum's key is the sum of the keys."""
    return number.to(tl.uint64) * 0x9E3779B97F4A7C15


@kernel("num_src", "num_dst", "num_pairs", "num_chunks", small=("src_ids", "dst_ids", "sums"))
def _copy_chunks(
    src: tl.tensor,
    src_ids: tl.tensor,
    num_src: tl.tensor,
    dst: tl.tensor,
    dst_ids: tl.tensor,
    num_dst: tl.tensor,
    sums: tl.tensor,
    num_pairs: tl.tensor,
    num_chunks: tl.tensor,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    STORES: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    index = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    num_words = num_pairs * 2  # the compiler sees an even number, and moves 16 bytes at a time
    source = tl.load(src_ids + index)
    target = tl.load(dst_ids + index)
    if (source >= 0) & (source < num_src) & (target >= 0) & (target < num_dst):
        start = chunk * (ROUNDS * WIDTH)
        rounds = tl.arange(0, ROUNDS)[:, None] * WIDTH
        columns = tl.arange(0, WIDTH)[None, :]
        at = start + rounds + columns
        inside = at < num_words
        # Each byte is used once: it should not push out of the cache what is used again.
        words = tl.load(src + source * num_words + at, mask=inside, other=0, eviction_policy="evict_first")
        if STORES:
            tl.store(dst + target * num_words + at, words, mask=inside, eviction_policy="evict_first")
        if SUMS:
            # In three terms, from which the compiler makes fewer products and issues all loads before the first of them.
            keys = _key(start + 1) + _key(rounds) + _key(columns)
            mixed = tl.where(inside, _mixed(words.to(tl.uint64, bitcast=True), keys), 0)
            tl.atomic_add(sums + index, tl.sum(mixed.to(tl.int64, bitcast=True)), sem="relaxed")
