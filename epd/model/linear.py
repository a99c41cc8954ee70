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


Piece = tuple[int, int, int, int, int, int, int]  # what `matmul_rows_at` takes


class Linear:
    """The weights named, side by side: their outputs follow each other in a row.

    They are one product where `Weights.joined` puts them side by side in memory, and one product each otherwise. A row's result
    does not depend on the others in the batch, to the last bit.
    """

    def __init__(self, weights: Weights, names: Sequence[str], *, bias: bool = False) -> None:
        joined = weights.joined([f"{name}.weight" for name in names])
        parts = [joined] if joined is not None else [weights.tensor(f"{name}.weight") for name in names]
        self._matrix = Matrix([part.flatten(1) for part in parts])  # a convolution over whole patches is a product too
        self._bias = torch.cat([weights.tensor(f"{name}.bias") for name in names]) if bias else None

    def __call__(self, x: Tensor, out: Tensor | None = None, team: Team | None = None) -> Tensor:
        """x [n, in] -> out [n, out], float32, contiguous. The outputs are shared out over `team`; the result does not show it."""
        out = torch.empty(x.shape[0], self._matrix.num_outputs) if out is None else out
        run_pieces(self._matrix.pieces(x.data_ptr(), out.data_ptr(), x.shape[0], team), team)
        if self._bias is not None:
            out += self._bias
        return out


class Matrix:
    """Tensors [out, in], float32, contiguous, whose outputs follow each other in a row; how a product with them is cut up."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._kept = list(parts)
        # address, first column of the output, number of outputs
        self._parts: list[tuple[int, int, int]] = []
        start = 0
        for part in parts:
            self._parts.append((part.data_ptr(), start, len(part)))
            start += len(part)
        self.num_inputs, self.num_outputs = parts[0].shape[1], start

    def pieces(self, x_at: int, out_at: int, num_rows: int, team: Team | None) -> list[Piece]:
        """The product of the rows at `x_at`, to those at `out_at`; for a team, in pieces that are worth a thread each."""
        width, out_width = self.num_inputs, self.num_outputs
        if team is None or num_rows * width * out_width < _WORTH_SHARING:
            return [
                (x_at, address, out_at + 4 * start, num_rows, count, width, out_width) for address, start, count in self._parts
            ]
        return [
            (x_at, address + 4 * width * first, out_at + 4 * (start + first), num_rows, last - first, width, out_width)
            for address, start, count in self._parts
            for first, last in _split(count, _PIECES_PER_THREAD * team.num_threads)
        ]


def run_pieces(pieces: Sequence[Piece], team: Team | None) -> None:
    """Products that do not depend on each other, shared out over `team` where they are worth it."""
    if team is None or sum(piece[3] * piece[4] * piece[5] for piece in pieces) < _WORTH_SHARING:
        for piece in pieces:
            matmul_rows_at(*piece)
    else:
        team.run(matmul_rows_at, pieces)


def _split(count: int, num_pieces: int) -> list[tuple[int, int]]:
    """[0, count) in about equal pieces of whole kernel tiles."""
    step = max(48, -(-count // num_pieces // 48) * 48)
    return [(first, min(first + step, count)) for first in range(0, count, step)]
