"""One row through each of a layer's matrix products and what stands beside it, one by one and fused: decode at batch 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epd.model.config import TextConfig
from epd.model.device.work_queue import open_queue
from gpu.cuda.kernels import FusedLinear, Kernels
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits, Missing

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Product:
    """`num_rows` of weights of `width`; a norm before it, an activation or a sum behind it."""

    name: str
    width: int
    num_rows: int
    has_norm: bool = True
    is_gated: bool = False


def products(text: TextConfig) -> tuple[Product, ...]:
    heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return (
        Product("norm, QKV", text.hidden_size, heads + 2 * kv_heads),
        Product("output, sum", heads, text.hidden_size, has_norm=False),
        Product("norm, gate and up, SiLU", text.hidden_size, 2 * text.intermediate_size, is_gated=True),
        Product("down, sum", text.intermediate_size, text.hidden_size, has_norm=False),
    )


def run(rig: Rig) -> Figures:
    limits, kernels = rig.known_limits(), rig.backend.kernels
    if kernels.fused is None:
        yield Missing("one row, fused", f"the kernel set {kernels.name} leaves linear layers to torch")
        return
    for product in products(rig.config.text):
        yield _measure(rig, _OneRow(rig, product, kernels, kernels.fused), limits)
        rig.give_back()


class _OneRow:
    """What a product is given, and both ways to it for one matrix of weights."""

    def __init__(self, rig: Rig, product: Product, kernels: Kernels, fused: FusedLinear) -> None:
        self.product = product
        self._kernels, self._fused = kernels, fused
        self._x, self._delta = _random(rig, 1, product.width), _random(rig, 1, product.width)
        self._norm = _random(rig, product.width)
        self._made = _random(rig, 1, product.num_rows)
        self._out = _random(rig, 1, product.num_rows // (2 if product.is_gated else 1))

    def separate(self, weight: Tensor) -> None:
        """A sum is left to the norm that follows, as in the model."""
        x = self._x
        if self.product.has_norm:
            x = self._delta
            self._kernels.add_rms_norm(self._delta, self._x, self._norm, _EPS, x)
        torch.mm(x, weight.t(), out=self._made if self.product.is_gated else self._out)
        if self.product.is_gated:
            self._kernels.silu_mul(self._made, self._out)

    def fused(self, weight: Tensor) -> None:
        if self.product.is_gated:
            self._fused.norm_silu_mul(self._x, self._norm, _EPS, weight, self._out)
        elif self.product.has_norm:
            self._fused.norm_linear(self._x, self._norm, _EPS, weight, self._out)
        else:
            self._fused.linear_add(self._x, weight, self._out)


def _measure(rig: Rig, row: _OneRow, limits: Limits) -> Row:
    """From graphs over so many weights that none is still in a cache when its turn comes again."""
    product, queue = row.product, open_queue(rig.device)
    each = product.num_rows * product.width * rig.dtype.itemsize
    weights = [_random(rig, product.num_rows, product.width) for _ in range(max(2, rig.loads.linear_bytes // each))]

    def seconds(way: Callable[[Tensor], None]) -> float:
        def all_of_them() -> None:
            for weight in weights:
                way(weight)

        return rig.timer.median_s(queue.capture(all_of_them), rounds=rig.loads.rounds) / len(weights)

    one_by_one, together = seconds(row.separate), seconds(row.fused)
    reached = each / together
    return make_row(
        f"one row: {product.name}",
        reached / 1e9,
        "GB/s",
        baseline=each / one_by_one / 1e9,
        note=f"{each / 1e6:.1f} MB of weights in {1e6 * together:.1f} us, {reached / limits.copy_bytes_per_s:.0%} of a copy; "
        f"baseline: torch's product and kernels of their own, {1e6 * one_by_one:.1f} us",
    )


def _random(rig: Rig, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=rig.dtype, device=rig.device).normal_().mul_(shape[-1] ** -0.5)
