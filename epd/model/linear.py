"""Matrix products with a checkpoint's weights: x @ weight.T + bias, of one weight or of several that share their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epd.model.weights import Weights


class Linear:
    """The weights named, side by side: their outputs follow each other in a row.

    They are one product where `Weights.joined` puts them side by side in memory, and one product each otherwise.
    """

    def __init__(self, weights: Weights, names: Sequence[str], *, bias: bool = False) -> None:
        joined = weights.joined([f"{name}.weight" for name in names])
        parts = [joined] if joined is not None else [weights.tensor(f"{name}.weight") for name in names]
        biases = [weights.tensor(f"{name}.bias") for name in names] if bias else []
        if biases and joined is not None:
            biases = [torch.cat(biases)]
        self._parts: list[tuple[Tensor, Tensor | None, int, int]] = []  # weight [in, out], bias, columns of the output
        start = 0
        for i, weight in enumerate(parts):
            self._parts.append((weight.t(), biases[i] if biases else None, start, start + len(weight)))
            start += len(weight)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x [n, in] -> out [n, out], float32."""
        if len(self._parts) == 1:
            weight, bias, _, _ = self._parts[0]
            _product(x, weight, bias, out)
            return
        for weight, bias, start, end in self._parts:
            _product(x, weight, bias, out[:, start:end])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)
