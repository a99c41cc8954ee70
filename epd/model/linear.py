"""Matrix products with a checkpoint's weights: x @ weight.T + bias, of one weight or of several that share their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epd.model.weights import Weights
from gpu.kernels.matmul_rows import matmul_rows_at
from gpu.team import Team

_WORTH_SHARING = 1 << 22  # multiplications; less is done before another thread has woken up
_PIECES_PER_THREAD = 3  # so that a thread that is held up does not hold up the others for long


class Linear:
    """The weights named, side by side: their outputs follow each other in a row.

    They are one product where `Weights.joined` puts them side by side in memory, and one product each otherwise. A row's result
    does not depend on the others in the batch, to the last bit.
    """

    def __init__(self, weights: Weights, names: Sequence[str], *, bias: bool = False) -> None:
        joined = weights.joined([f"{name}.weight" for name in names])
        parts = [joined] if joined is not None else [weights.tensor(f"{name}.weight") for name in names]
        self._weights = [part.flatten(1) for part in parts]  # a convolution over whole patches is a product too
        self._bias = torch.cat([weights.tensor(f"{name}.bias") for name in names]) if bias else None
        # address, first column of the output, number of outputs
        self._parts: list[tuple[int, int, int]] = []
        start = 0
        for weight in self._weights:
            self._parts.append((weight.data_ptr(), start, len(weight)))
            start += len(weight)
        self._num_inputs, self._num_outputs = self._weights[0].shape[1], start

    def __call__(self, x: Tensor, out: Tensor | None = None, team: Team | None = None) -> Tensor:
        """x [n, in] -> out [n, out], float32, contiguous. The outputs are shared out over `team`; the result does not show it."""
        out = torch.empty(x.shape[0], self._num_outputs) if out is None else out
        x_at, out_at, num_rows, width = x.data_ptr(), out.data_ptr(), x.shape[0], self._num_inputs
        if team is None or num_rows * width * self._num_outputs < _WORTH_SHARING:
            for address, start, count in self._parts:
                matmul_rows_at(x_at, address, out_at + 4 * start, num_rows, count, width, self._num_outputs)
        else:
            pieces = [
                (
                    x_at,
                    address + 4 * width * first,
                    out_at + 4 * (start + first),
                    num_rows,
                    last - first,
                    width,
                    self._num_outputs,
                )
                for address, start, count in self._parts
                for first, last in _split(count, _PIECES_PER_THREAD * team.num_threads)
            ]
            team.run(matmul_rows_at, pieces)
        if self._bias is not None:
            out += self._bias
        return out


def _split(count: int, num_pieces: int) -> list[tuple[int, int]]:
    """[0, count) in about equal pieces of whole kernel tiles."""
    step = max(48, -(-count // num_pieces // 48) * 48)
    return [(first, min(first + step, count)) for first in range(0, count, step)]
