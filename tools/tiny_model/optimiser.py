"""Muon: momentum whose matrix updates are made orthogonal; small models need about half of AdamW's steps with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the odd quintic whose iteration drives singular values towards 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For weight matrices only. Updates are scaled to the size of AdamW's, so both share one learning rate."""

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """One update; equal shapes are made orthogonal together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(m, group["momentum"]) for m in matrices]))
                scale = 0.2 * max(shape) ** 0.5  # AdamW's updates have a root mean square of about 0.2
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the running gradient."""
        assert matrix.grad is not None
        state = self.state[matrix]
        running: Tensor = state.setdefault("running", torch.zeros_like(matrix))
        running.lerp_(matrix.grad, 1 - momentum)
        ahead: Tensor = matrix.grad.lerp(running, momentum)
        return ahead


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with all singular values near 1, by Newton-Schulz iteration."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
