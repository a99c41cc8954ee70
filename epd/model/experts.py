"""A feed-forward layer of many experts, of which each token takes a few: routing, the products, the sum of what came out.

Knows one layer. Tokens are sorted by expert, so that each expert's weights are read once a step whoever chose it. A row's result
does not depend on the others in the batch, to the last bit. Does not know the layers around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from epd.model.config import ExpertsConfig
from epd.model.linear import Linear, Matrix, run_pieces
from epd.model.weights import Weights
from gpu.kernels.choose_experts import choose_experts
from gpu.kernels.mix_rows import mix_rows
from gpu.kernels.silu_mul import silu_mul
from gpu.team import Team


class Experts:
    """Immutable after construction; working memory is the caller's."""

    def __init__(self, config: ExpertsConfig, weights: Weights, prefix: str) -> None:
        self._config = config
        self._router = Linear(weights, [f"{prefix}mlp.gate"])
        name = f"{prefix}mlp.experts."
        if config.is_packed:
            self._gate_up = [Matrix([each]) for each in weights.tensor(f"{name}gate_up_proj")]
            self._down = [Matrix([each]) for each in weights.tensor(f"{name}down_proj")]
        else:
            names = [f"{name}{i}." for i in range(config.num_experts)]
            self._gate_up = [Matrix([weights.tensor(f"{each}{part}_proj.weight") for part in ("gate", "up")]) for each in names]
            self._down = [Matrix([weights.tensor(f"{each}down_proj.weight")]) for each in names]

    def __call__(self, x: Tensor, out: Tensor, memory: ExpertMemory, team: Team | None = None) -> None:
        """x [n, hidden] -> out [n, hidden], float32, contiguous, not the same."""
        num_rows, num_chosen = len(x), self._config.num_chosen
        chosen, shares = np.empty((num_rows, num_chosen), np.int64), np.empty((num_rows, num_chosen), np.float32)
        choose_experts(self._router(x, team=team).numpy(), self._config.normalizes, chosen, shares)
        order = np.argsort(chosen, axis=None, kind="stable")  # of (row, place) pairs, by expert
        counts = np.bincount(chosen.ravel(), minlength=self._config.num_experts).tolist()
        rows, gate_up, inner = memory.of(num_rows * num_chosen, x.shape[1], self._config.intermediate_size)
        torch.index_select(x, 0, torch.from_numpy(order // num_chosen), out=rows)
        _multiply(self._gate_up, counts, rows, gate_up, team)
        silu_mul(gate_up.numpy(), inner.numpy())
        _multiply(self._down, counts, inner, rows, team)
        places = np.empty_like(chosen)
        places.ravel()[order] = np.arange(len(order))
        mix_rows(rows.numpy(), places, shares, out.numpy())


class ExpertMemory:
    """Working memory of one runner. Grows to the largest step seen."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, num_pairs: int, hidden_size: int, intermediate_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """For so many pairs of a token and an expert: [n, hidden], [n, 2 * intermediate], [n, intermediate]."""
        widths = (hidden_size, 2 * intermediate_size, intermediate_size)
        if len(self._memory) < num_pairs * sum(widths):
            self._memory = torch.empty(num_pairs * sum(widths))
        parts = self._memory[: num_pairs * sum(widths)].split([num_pairs * width for width in widths])
        rows, gate_up, inner = (part.view(num_pairs, width) for part, width in zip(parts, widths, strict=True))
        return rows, gate_up, inner


def _multiply(matrices: Sequence[Matrix], counts: Sequence[int], x: Tensor, out: Tensor, team: Team | None) -> None:
    """The first counts[0] rows of x with the first matrix, the following with the second, and so on."""
    x_at, out_at, pieces = x.data_ptr(), out.data_ptr(), []
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            pieces += matrix.pieces(x_at, out_at, count, team)
            x_at += 4 * matrix.num_inputs * count
            out_at += 4 * matrix.num_outputs * count
    run_pieces(pieces, team)
