"""The layers of the language model on a device: their weights, and a feed-forward layer's launches.

Knows one layer. Does not know batches, attention or KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from epd.model.config import ExpertsConfig, TextConfig
from epd.model.device.buffers import Rows
from epd.model.shapes import expert_groups
from gpu.cuda.kernels import ExpertGeometry, Kernels


class TensorSource(Protocol):
    """Where weights come from."""

    def tensor(self, name: str) -> Tensor: ...

    def joined(self, names: Sequence[str]) -> Tensor | None:
        """The tensors one below the other, or None where the caller is to join them."""


class Layer:
    def __init__(self, config: TextConfig, layer: int, source: Source, prefix: str) -> None:
        self.input_norm = source.tensor(f"{prefix}input_layernorm.weight")
        self.post_norm = source.tensor(f"{prefix}post_attention_layernorm.weight")
        self.q_norm = source.tensor(f"{prefix}self_attn.q_norm.weight")
        self.k_norm = source.tensor(f"{prefix}self_attn.k_norm.weight")
        attention, has_bias = f"{prefix}self_attn.", config.attention_bias
        self.qkv = Linear(source, [f"{attention}{name}_proj" for name in "qkv"], bias=has_bias)
        self.output = Linear(source, [f"{attention}o_proj"], bias=has_bias)
        experts = config.experts_of(layer)
        self.mlp = Mlp(source, prefix) if experts is None else Experts(experts, source, prefix)

    @property
    def dense(self) -> Mlp:
        if not isinstance(self.mlp, Mlp):
            raise TypeError("this layer has experts")
        return self.mlp


class Mlp:
    """A dense feed-forward layer, from `normed` to `delta`."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.gate_up = Linear(source, [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"])
        self.down = Linear(source, [f"{prefix}mlp.down_proj"])

    def __call__(self, kernels: Kernels, rows: Rows) -> None:
        self.gate_up(rows.normed, rows.gate_up)
        kernels.silu_mul(rows.gate_up, rows.inner)
        self.down(rows.inner, rows.delta)


class Experts:
    """A feed-forward layer of many experts, from `normed` to `delta`."""

    def __init__(self, config: ExpertsConfig, source: Source, prefix: str) -> None:
        self._config = config
        self._router = source.tensor(f"{prefix}mlp.gate.weight")
        if config.is_packed:
            self._gate_up, self._down = (source.tensor(f"{prefix}mlp.experts.{part}_proj") for part in ("gate_up", "down"))
        else:
            joined = (source.joined(names) for names in expert_groups(config, prefix))
            self._gate_up, self._down = (each.view(config.num_experts, -1, each.shape[1]) for each in joined)

    @property
    def geometry(self) -> ExpertGeometry:
        return ExpertGeometry(
            num_experts=self._config.num_experts,
            num_chosen=self._config.num_chosen,
            intermediate_size=self._config.intermediate_size,
            normalizes=self._config.normalizes,
            is_turned=not self._down.is_contiguous(),
        )

    def __call__(self, kernels: Kernels, rows: Rows) -> None:
        logits = torch.empty((len(rows.normed), self._config.num_experts), device=rows.normed.device)
        project(rows.normed, self._router, logits)
        kernels.experts(
            rows.normed, logits, self._gate_up, self._down, self._config.num_chosen, self._config.normalizes, rows.delta
        )


class Linear:
    """x @ weight.T + bias of the weights named, side by side: their outputs follow each other in a row."""

    def __init__(self, source: Source, names: Sequence[str], *, bias: bool = False) -> None:
        self.weight = source.joined([f"{name}.weight" for name in names])
        self._bias = torch.cat([source.tensor(f"{name}.bias") for name in names]) if bias else None

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x [n, in] -> out [n, out]"""
        if self._bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self._bias, x, self.weight.t(), out=out)


class Source:
    """Weights on one device in one dtype, where they are already if whoever loaded them knew."""

    def __init__(self, weights: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name).to(self._device, self._dtype)

    def joined(self, names: Sequence[str]) -> Tensor:
        joined = self._weights.joined(names)
        if joined is None:
            return torch.cat([self.tensor(name) for name in names])
        return joined.to(self._device, self._dtype)


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T in float32, of factors in any dtype, the sum not rounded to theirs."""
    if x.dtype == torch.float32:
        torch.mm(x, weight.t(), out=out)
    elif x.is_cuda:
        torch.mm(x, weight.t(), torch.float32, out=out)
    else:
        torch.mm(x.float(), weight.float().t(), out=out)
