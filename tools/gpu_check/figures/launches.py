"""What a piece of work gives the device to do: kernels and copies, as the driver's tracing sees them, graphs unfolded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = ("memcpy", "memset")


def count_launches(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(kernels, copies and fills) of one run of `work`. Waits for the device. On the host: torch's operations, and no copies."""
    if device.type != "cuda":
        with _Counting() as counting:
            work()
        return counting.num_calls, 0
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as tracing:
        work()
        torch.cuda.synchronize(device)
    events: list[Any] = list(tracing.events())
    names = [str(event.name).lower() for event in events if str(event.device_type).endswith("CUDA")]
    if not names:
        raise RuntimeError("the profiler saw nothing on the device")
    copies = sum(name.startswith(_COPIES) for name in names)
    return len(names) - copies, copies


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # inherited by a class of ours: the exclusion is by module
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))
