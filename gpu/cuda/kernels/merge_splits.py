"""merge_splits: what the splits of paged_attention left in the workspace, weighted by their log-sum-exp, to its result.

The workspace: sums float32 [num_seqs, num_heads, num_splits, head_dim], each weighted under its own maximum; then that maximum
and the sum of weights, float32 [num_seqs, num_heads, num_splits, 2].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from gpu.cuda.kernels.device import (
    SIMULATED,
    address,
    device,
    exp2,
    load_f32,
    load_i32,
    load_words,
    packing,
    reciprocal,
    store_words,
)
from gpu.cuda.kernels.launch import Kernel, units
from gpu.cuda.kernels.shapes import units_per_row

LOWEST = np.float32(-1e30)  # instead of an infinity, whose difference with itself is no number

_THREADS = 16 if SIMULATED else 128
_MIN_SPLIT = 16 if SIMULATED else 64  # tokens; fewer are not worth a thread block
_ZERO = np.float32(0.0)


def merge_splits(workspace: Tensor, context_lens: Tensor, max_tokens: int, num_splits: int, out: Tensor) -> None:
    """out: [num_seqs, num_heads, head_dim]; only the splits that a context has are read."""
    num_seqs, num_heads, head_dim = out.shape
    kernel = _kernel(out.dtype, units_per_row(head_dim, out.dtype, "a head"))
    grid = (num_heads, num_seqs)
    kernel.launch(grid, out.device, units(workspace), address(context_lens), max_tokens, num_splits, units(out))


@device
def split_length(context_len: Any, num_splits: Any) -> Any:
    """How many tokens each split takes but the last that has any; those beyond the context are empty."""
    length = (context_len + num_splits - 1) // num_splits
    return (length + (_MIN_SPLIT - 1)) // _MIN_SPLIT * _MIN_SPLIT


@cache
def _kernel(dtype: torch.dtype, head_units: int) -> Kernel:
    width, _, pack = packing(dtype)
    _, unpack_f32, _ = packing(torch.float32)
    quads = width // 4  # units of float32 that become a unit
    teams = max(1, _THREADS // head_units)
    team_numbers = teams * head_units * width
    head_dim = head_units * width

    def merge_splits_kernel(workspace: Any, context_lens: Any, max_tokens: int, num_splits: int, out: Any) -> None:
        head = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
        lane, team = cuda.threadIdx.x % head_units, cuda.threadIdx.x // head_units
        context_len = min(load_i32(context_lens, cuda.blockIdx.y), max_tokens)
        num_used = 0
        if context_len > 0:
            length = split_length(context_len, num_splits)
            num_used = (context_len + length - 1) // length
        first = head * num_splits
        marks = cuda.gridDim.y * cuda.gridDim.x * num_splits * head_dim + 2 * first
        sums = cuda.local.array(width, np.float32)
        part = cuda.local.array(width, np.float32)
        top, total = LOWEST, _ZERO
        for i in range(num_used):
            top = max(top, load_f32(workspace, marks + 2 * i))
        for j in range(width):
            sums[j] = _ZERO
        for i in range(team, num_used, teams):
            weight = exp2(load_f32(workspace, marks + 2 * i) - top)
            total += weight * load_f32(workspace, marks + 2 * i + 1)
            for quad in range(quads):
                unpack_f32(load_words(workspace, ((first + i) * head_units + lane) * quads + quad), part, 4 * quad)
            for j in range(width):
                sums[j] += weight * part[j]
        team_totals = cuda.shared.array(teams, np.float32)
        team_sums = cuda.shared.array(team_numbers, np.float32)
        team_totals[team] = total
        for j in range(width):
            team_sums[(team * width + j) * head_units + lane] = sums[j]
        cuda.syncthreads()
        if team == 0:
            for t in range(1, teams):
                total += team_totals[t]
                for j in range(width):
                    sums[j] += team_sums[(t * width + j) * head_units + lane]
            factor = reciprocal(total) if total > _ZERO else _ZERO
            for j in range(width):
                sums[j] *= factor
            store_words(out, head * head_units + lane, pack(sums, 0))

    return Kernel(merge_splits_kernel, "int64, int64, int64, int64, int64", teams * head_units)
