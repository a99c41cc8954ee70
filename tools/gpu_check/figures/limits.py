"""What the device can do: bytes copied within it, bytes only read, a large product of matrices. On random data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tools.bench.rows import make_row
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits


def run(rig: Rig) -> Figures:
    """Before anything large is on the device."""
    copied, read, reader = _bytes_per_s(rig)
    rig.give_back()
    flop = _flop_per_s(rig)
    rig.give_back()
    rig.limits = Limits(copied, read, flop)
    yield rig.limits
    size = f"{rig.loads.copy_bytes / 2**30:g} GiB"
    side = rig.loads.matrix_side
    yield make_row(
        "limit: copy on the device, read + written", copied / 1e9, "GB/s", note=f"{size}, median of {rig.loads.rounds}"
    )
    yield make_row("limit: read on the device", read / 1e9, "GB/s", note=f"{size} through {reader}, the faster of two reductions")
    yield make_row(f"limit: {rig.backend.dtype} product", flop / 1e12, "TFLOP/s", note=f"{side} x {side} x {side}, random data")


def _bytes_per_s(rig: Rig) -> tuple[float, float, str]:
    """(copied, read, what read it). Random bits would be NaN here and there: random numbers are as hard to move."""
    source = torch.randn(rig.loads.copy_bytes // 4, device=rig.device)
    target = torch.empty_like(source)
    copied_s = rig.timer.median_s(lambda: target.copy_(source), rounds=rig.loads.rounds)
    readers: dict[str, Callable[[], object]] = {"torch.sum": lambda: source.sum(), "torch.amax": lambda: torch.amax(source)}
    reads = {name: rig.timer.median_s(work, rounds=rig.loads.rounds) for name, work in readers.items()}
    reader = min(reads, key=lambda name: reads[name])
    return 2 * source.nbytes / copied_s, source.nbytes / reads[reader], reader


def _flop_per_s(rig: Rig) -> float:
    side = rig.loads.matrix_side
    left, right = (torch.randn(side, side, device=rig.device).to(rig.dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / rig.timer.median_s(lambda: torch.mm(left, right, out=out), rounds=rig.loads.rounds)
