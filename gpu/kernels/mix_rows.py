"""mix_rows: what several experts made of each token, added up by their shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpu.kernels.checks import check_rows, expect
from gpu.kernels.compiler import kernel

Float = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def mix_rows(rows: Float, places: Ids, shares: Float, out: Float) -> None:
    """out[i] = sum over j of shares[i, j] * rows[places[i, j]], in the order of j, so that it depends on nothing but row i.

    rows: float32 [m, width]; places: int64 [n, k]; shares: float32 [n, k]; out: float32 [n, width], no part of `rows`. All
    contiguous. Raises ValueError for shapes, IndexError for places that are not among the rows.
    """
    expect(shares, places.shape, "shares")
    expect(out, (len(places), rows.shape[1]), "out")
    check_rows(places, len(rows))
    _mix_rows(rows, places, shares, out)


@kernel("void(float32[:,::1], int64[:,::1], float32[:,::1], float32[:,::1])")
def _mix_rows(rows: Float, places: Ids, shares: Float, out: Float) -> None:
    width = out.shape[1]
    for row in range(out.shape[0]):
        out[row] = np.float32(0.0)
        for j in range(places.shape[1]):
            place, share = places[row, j], shares[row, j]
            for i in range(width):
                out[row, i] += share * rows[place, i]
