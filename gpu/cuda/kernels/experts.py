"""A feed-forward layer of many experts by torch's grouped products, for a device that Triton does not compile for.

Rows are sorted by expert on the device, with no word to the host, and each expert's run of them is multiplied with its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from gpu.cuda.kernels.checks import check_experts


def experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, num_chosen: int, normalizes: bool, out: Tensor) -> None:
    """See `gpu.cuda.kernels.Kernels`. In bfloat16, shares and what stands between products are rounded to it too.

    Of float32 no graph can be captured: torch multiplies it run by run, and asks the device where they end.
    """
    check_experts(x, logits, gate_up, down, num_chosen, out)
    if not x.numel():
        return
    num_rows, num_experts = logits.shape
    shares, chosen = logits.softmax(dim=-1).topk(num_chosen)
    if normalizes:
        shares /= shares.sum(dim=-1, keepdim=True)
    by_expert, order = chosen.view(-1).sort(stable=True)
    every = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(by_expert, every, right=True, out_int32=True)
    gates, ups = grouped_mm(x.index_select(0, order // num_chosen), gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    inner = silu(gates) * ups
    parts = torch.empty((num_rows * num_chosen, x.shape[1]), dtype=x.dtype, device=x.device)
    parts.index_copy_(0, order, grouped_mm(inner, down.transpose(1, 2), offs=ends))
    torch.bmm(shares.to(x.dtype)[:, None], parts.view(num_rows, num_chosen, -1), out=out[:, None])
