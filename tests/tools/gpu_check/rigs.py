"""A rig without a device: the bundled model's geometry over a driver whose memory is the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu.cuda.backend import CudaBackend
from gpu.cuda.reference import TorchKernels
from tests.gpu.cuda.fake_driver import FakeDriver, fake_backend
from tools.bench.rows import Row
from tools.gpu_check.figures import limits, prefill, vision
from tools.gpu_check.figures.rig import Loads, Rig
from tools.gpu_check.found import Figures, Found, Limits, Missing
from tools.gpu_check.order import Order

FOLDER = Path(__file__).parents[3] / "epd/assets/tiny-vl"
LIMITS = Limits(copy_bytes_per_s=2e9, read_bytes_per_s=1e9, flop_per_s=4e12)
LOADS = Loads(
    copy_bytes=1 << 20,
    matrix_side=64,
    decode=((1, 64), (12, 48)),
    decode_steps=6,
    attention=(6, 96),
    prefill_tokens=96,
    short_prompts=(5, 20),
    num_images=2,
    image_size=(64, 64),
    ipc_bytes=1 << 18,
    linear_bytes=1 << 18,
    experts=(6, 2, 16, 32),
    expert_rows=(1, 5, 150),
    max_model_len=256,
    reserve_bytes=1 << 20,
    rounds=2,
)
OPENER = "tests.tools.gpu_check.rigs:open_backend"


class OtherKernels(TorchKernels):
    """As if they were another set."""

    name = "numba"


class ScriptedTimer:
    """Everything takes as long as it says. Work is done once, so that it can fail."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def median_s(self, work: Callable[[], object], *, rounds: int = 1, warm_ups: int = 0) -> float:
        work()
        return self.seconds

    def synchronize(self) -> None:
        pass


def open_backend(total_bytes: int = 1 << 30) -> CudaBackend:
    return fake_backend(FakeDriver(total_bytes=total_bytes), dtype=torch.float32)


@contextmanager
def open_rig(known: Limits | None = LIMITS, loads: Loads = LOADS, total_bytes: int = 1 << 30) -> Iterator[Rig]:
    rig = Rig(open_backend(total_bytes), FOLDER, loads, known, {"numba": OtherKernels, "triton": _no_such_set})
    try:
        yield rig
    finally:
        rig.close()


def open_parts(order: Order) -> tuple[Rig, Mapping[str, Callable[[Rig], Figures]]]:
    """As tools.gpu_check.child opens a device's, in its process."""
    known = Limits(**order.limits) if order.limits else None
    return Rig(open_backend(), FOLDER, LOADS, known), {"limits": limits.run, "vision": vision.run, "prefill": prefill.run}


def rows_of(found: Iterator[Found]) -> dict[str, Row]:
    """By name; raises AssertionError for a figure that is missing."""
    rows: dict[str, Row] = {}
    for each in found:
        assert not isinstance(each, Missing), each
        if isinstance(each, dict):
            rows[each["name"]] = each
    return rows


def _no_such_set() -> TorchKernels:
    raise ImportError("no triton here")
