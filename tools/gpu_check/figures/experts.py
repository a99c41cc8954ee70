"""A layer of experts alone, with the geometry of Qwen3-VL-30B-A3B: our kernels beside torch's grouped products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epd.model.device.work_queue import open_queue
from gpu.cuda.kernels.experts import experts as grouped
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Limits, Missing

_BYTES_BOUND_ROWS = 128  # up to so many a step is a matter of reading weights
_STEPS = 8  # that take turns, each with its own choice of experts, so that few weights are in a cache when they are wanted


@dataclass(frozen=True, slots=True)
class Layer:
    """`gate_up` [num_experts, 2 * inner, width] and `down` [num_experts, width, inner]."""

    gate_up: Tensor
    down: Tensor
    num_chosen: int

    @property
    def numbers_of_one(self) -> int:
        return self.gate_up[0].numel() + self.down[0].numel()


def run(rig: Rig) -> Figures:
    limits = rig.known_limits()
    for is_turned, stored in ((True, "as published"), (False, "as transformers saves them")):
        layer = make_layer(rig, is_turned=is_turned)
        for num_rows in rig.loads.expert_rows:
            name = f"experts, {stored}, {num_rows} rows"
            try:
                yield _measure(rig, layer, name, num_rows, limits)
            except RuntimeError as error:  # grouped products are not for every device
                yield Missing(name, f"{type(error).__name__}: {error}")
        del layer
        rig.give_back()


def make_layer(rig: Rig, *, is_turned: bool) -> Layer:
    num_experts, num_chosen, inner, width = rig.loads.experts

    def weight(num_columns: int, num_inputs: int) -> Tensor:
        shape = (num_inputs, num_columns) if is_turned else (num_columns, num_inputs)
        stored = torch.empty((num_experts, *shape), dtype=rig.dtype, device=rig.device).normal_().mul_(num_inputs**-0.5)
        return stored.transpose(1, 2) if is_turned else stored

    return Layer(weight(2 * inner, width), weight(width, inner), num_chosen)


def _measure(rig: Rig, layer: Layer, name: str, num_rows: int, limits: Limits) -> Row:
    num_experts, num_chosen, _, width = rig.loads.experts
    x = torch.empty((num_rows, width), dtype=rig.dtype, device=rig.device).normal_()
    choices = [torch.empty((num_rows, num_experts), device=rig.device).normal_() for _ in range(_STEPS)]
    out, queue = torch.empty_like(x), open_queue(rig.device)

    def seconds(way: Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, Tensor], None]) -> float:
        def all_of_them() -> None:
            for logits in choices:
                way(x, logits, layer.gate_up, layer.down, num_chosen, True, out)

        all_of_them()  # what is compiled or chosen at the first call is so before a graph is captured
        rig.timer.synchronize()
        return rig.timer.median_s(queue.capture(all_of_them), rounds=rig.loads.rounds) / _STEPS

    ours, theirs = seconds(rig.backend.kernels.experts), seconds(grouped)
    note = f"{1e6 * ours:.1f} us; baseline: torch's grouped products, {1e6 * theirs:.1f} us"
    if num_rows <= _BYTES_BOUND_ROWS:
        touched = sum(len(logits.topk(num_chosen).indices.unique()) for logits in choices) / _STEPS
        num_bytes = touched * layer.numbers_of_one * rig.dtype.itemsize
        share = f"{num_bytes / 1e6:.1f} MB of {touched:.0f} experts, {num_bytes / ours / limits.copy_bytes_per_s:.0%} of a copy"
        return make_row(name, num_bytes / ours / 1e9, "GB/s", baseline=num_bytes / theirs / 1e9, note=f"{share}; {note}")
    flop = 2 * num_rows * num_chosen * layer.numbers_of_one
    share = f"{flop / ours / limits.flop_per_s:.0%} of the matrix rate"
    return make_row(name, flop / ours / 1e12, "TFLOP/s", baseline=flop / theirs / 1e12, note=f"{share}; {note}")
