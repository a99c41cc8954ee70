"""Chunks of several sequences, as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gpu.cuda.kernels import Chunks


def chunks_of(lens: Sequence[int], context_lens: Sequence[int], block_tables: Tensor) -> Chunks:
    starts = [0, *accumulate(lens)][:-1]
    spans = torch.tensor([starts, list(lens), list(context_lens)], dtype=torch.int32, device=block_tables.device)
    return Chunks(tuple(lens), tuple(context_lens), spans, block_tables)
