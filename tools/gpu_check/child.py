"""The process that parts run in: `python -m tools.gpu_check.child ORDER`, where ORDER is JSON. Says line by line how far it is.

What it says is on the standard output that it was given; whatever libraries print goes to standard error. Parts run in order over
one rig, so that weights are made once. A part that raises ends itself alone; the caller sees to those that do not come back.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tools.gpu_check.order import Order

Say = Callable[[Mapping[str, Any]], None]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers which were started are stopped
    order = Order.from_json(sys.argv[1])
    with _own_output() as output:

        def say(event: Mapping[str, Any]) -> None:
            output.write(json.dumps(event) + "\n")
            output.flush()

        module, _, function = order.opener.partition(":")
        open_rig = getattr(importlib.import_module(module), function)
        run_parts(order, open_rig, say)
        output.flush()
    os._exit(0)  # threads of libraries may not know how to end


def run_parts(order: Order, open_rig: Callable[[Order], tuple[Any, Mapping[str, Callable[[Any], Any]]]], say: Say) -> None:
    """`open_rig` answers what parts are given, and the parts by name."""
    try:
        rig, parts = open_rig(order)
    except BaseException:
        say({"failed": order.parts[0], "error": traceback.format_exc(), "all": True})
        return
    for name in order.parts:
        say({"begin": name})
        started = time.perf_counter()
        try:
            for found in parts[name](rig):
                say(_event(found))
        except Exception:
            say({"failed": name, "error": traceback.format_exc()})
        else:
            say({"end": name, "seconds": time.perf_counter() - started})


def open_device_rig(order: Order) -> tuple[Any, Mapping[str, Callable[[Any], Any]]]:
    """The parts that measure our own code."""
    from gpu.cuda.backend import open_cuda
    from tools.gpu_check.figures import attention, decode, experts, ipc, limits, linear, loading, prefill, vision
    from tools.gpu_check.figures.rig import Loads, Rig
    from tools.gpu_check.found import Limits

    known = Limits(**order.limits) if order.limits else None
    rig = Rig(open_cuda(0), Path(order.folder), Loads.from_json(order.loads), known)
    return rig, {
        "limits": limits.run,
        "decode": decode.run,
        "linear": linear.run,
        "experts": experts.run,
        "attention": attention.run,
        "prefill": prefill.run,
        "vision": vision.run,
        "ipc": ipc.run,
        "loading": loading.run,
        "launches": decode.launches,
    }


def open_peer_rig(order: Order) -> tuple[Any, Mapping[str, Callable[[Any], Any]]]:
    """The part that measures transformers."""
    import torch

    from tools.gpu_check.figures import peer
    from tools.gpu_check.figures.rig import Loads
    from tools.gpu_check.found import Limits

    if not order.limits:
        raise ValueError("the device's limits were not measured in this run, so nothing can be held against them")
    rig = peer.PeerRig(
        Path(order.folder),
        torch.device("cuda", 0),
        torch.bfloat16,
        Limits(**order.limits),
        Loads.from_json(order.loads),
        compile_until=time.monotonic() + max(0.0, order.seconds - peer.COMPILE_S),
    )
    return rig, {"transformers": peer.run}


def open_serving(order: Order) -> tuple[Any, Mapping[str, Callable[[Any], Any]]]:
    """The part that puts load on servers. It touches no device itself."""
    from tools.gpu_check.serving import Setup, run

    return Setup(folder=order.folder, seconds=order.seconds, device_uuid=order.device_uuid), {"serving": run}


def _event(found: Any) -> Mapping[str, Any]:
    """By its kind, which is known by its name: a child that serves needs no torch to say what it found."""
    if isinstance(found, dict):
        return {"row": found}
    return {type(found).__name__.lower(): dataclasses.asdict(found)}


def _own_output() -> IO[str]:
    """Standard output, from now on for nobody else."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w")


if __name__ == "__main__":
    main()
