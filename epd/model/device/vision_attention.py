"""Attention within images, not causal, for a batch of images of different sizes: which kernel does it, chosen on the device.

Candidates on a GPU in half precision: FlashAttention over sequences of different lengths (https://arxiv.org/abs/2307.08691, as
torch ships it), which takes the whole batch in one launch; cuDNN's, one launch per image, which builds a plan for each length
that it meets. Both take heads of any multiple of 8 up to 128 as they are (FlashAttention 2 computes 72 in a kernel for 96). What
is faster depends on GPU, head size and library version, so it is timed when a stage starts. Elsewhere, torch's own choice, one
call for neighbours of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from epd.model.device.work_queue import WorkQueue

LONG = 4096  # patches, from which on an image fills a GPU by itself and may have a launch of its own
_GAIN = 0.9  # of the batched kernel's time: what plans per length must at least come down to
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Sequences:
    """What attends to itself, one after the other in a batch: frames of images, by rising length."""

    lengths: tuple[int, ...]
    starts: Tensor  # int32 [len(lengths) + 1], on the device

    @property
    def num_long(self) -> int:
        return sum(length >= LONG for length in self.lengths)


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]
"""(q, k, v, sequences) -> attended; all [num_patches, num_heads, head_dim], the last dimension contiguous."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A candidate, and how long one image of LONG patches took; None where it does not work here."""

    name: str
    seconds: float | None


def dense(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """torch's scaled dot product attention, on any device and in any dtype."""
    attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start = 0
    for length, run in groupby(sequences.lengths):
        count = len(list(run))
        part, shape = slice(start, start + length * count), (count, length, *q.shape[1:])
        queries, keys, values = (each[part].view(shape).transpose(1, 2) for each in (q, k, v))  # [sequences, heads, patches, dim]
        attended[part].view(shape).copy_(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2))
        start = part.stop
    return attended


def flash(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """FlashAttention for sequences of different lengths. CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    longest = max(sequences.lengths)
    attended = varlen_attn(q, k, v, sequences.starts, sequences.starts, longest, longest)
    assert isinstance(attended, Tensor)
    return attended


def cudnn(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """cuDNN's for long sequences, one by one, and FlashAttention for the rest. CUDA, half precision."""
    attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_short = len(sequences.lengths) - sequences.num_long
    start = sum(sequences.lengths[:num_short])
    if num_short:
        short = Sequences(sequences.lengths[:num_short], sequences.starts[: num_short + 1])
        attended[:start] = flash(q[:start], k[:start], v[:start], short)
    for length in sequences.lengths[num_short:]:
        part = slice(start, start + length)
        attended[part] = _cudnn_one(q[part], k[part], v[part])
        start += length
    return attended


def choose(queue: WorkQueue, *, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Kernel, list[Timed]]:
    """The kernel for a device, and what was timed for it. Waits for the device."""
    if queue.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return dense, []
    shape = (LONG, num_heads, head_dim)
    sample = [torch.randn(shape, device=queue.device).to(dtype) for _ in range(3)]
    sequences = Sequences((LONG,), torch.tensor([0, LONG], dtype=torch.int32, device=queue.device))
    candidates: dict[str, Kernel] = {"flash": flash, "cudnn": cudnn, "dense": dense}
    timed = [Timed(name, _seconds(queue, kernel, sample, sequences)) for name, kernel in candidates.items()]
    return candidates[pick(timed)], timed


def pick(timed: Sequence[Timed]) -> str:
    """cuDNN's where it gains enough to pay for its plans, else the batched one, else torch's choice."""
    seconds = {each.name: each.seconds for each in timed if each.seconds is not None}
    if "flash" in seconds and "cudnn" in seconds and seconds["cudnn"] <= _GAIN * seconds["flash"]:
        return "cudnn"
    return "flash" if "flash" in seconds else "dense"


def _cudnn_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its name rather than through torch's choice, which is a setting of the whole process and not of this thread."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))  # [1, heads, patches, head_dim]
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return attended[0].transpose(0, 1)


def _seconds(queue: WorkQueue, kernel: Kernel, sample: Sequence[Tensor], sequences: Sequences) -> float | None:
    q, k, v = sample
    try:
        kernel(q, k, v, sequences)  # builds what is built once
        queue.synchronize()
        before = queue.mark()
        for _ in range(_ROUNDS):
            kernel(q, k, v, sequences)
        after = queue.mark()
        queue.synchronize()
    except (ImportError, AttributeError, TypeError, RuntimeError):  # another version of torch has it otherwise, or not at all
        return None
    return after.seconds_since(before) / _ROUNDS
