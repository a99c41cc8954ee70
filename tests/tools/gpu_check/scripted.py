"""A process that measures nothing and does as its parts are called. Started in the place of tools.gpu_check.child."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from tools.bench.rows import make_row
from tools.gpu_check.order import Order

LIMITS = {"copy_bytes_per_s": 2e9, "read_bytes_per_s": 1e9, "flop_per_s": 4e12}
COMMAND = (sys.executable, "-m", "tests.tools.gpu_check.scripted")


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def main(order: Order) -> None:
    if order.opener == "silent":
        time.sleep(600)
    if order.opener == "cannot":
        print("no such thing", file=sys.stderr)
        sys.exit(7)
    if order.opener == "broken":
        say(failed=order.parts[0], error="Traceback\nValueError: cannot be opened", all=True)
        return
    limits = order.limits
    for name in order.parts:
        say(begin=name)
        limits = LIMITS if name == "limits" else limits
        if play(name, limits):
            say(end=name, seconds=0.25)


def play(name: str, limits: Mapping[str, float] | None) -> bool:
    """Whether it came to its end."""
    print("libraries print, too", flush=True)
    match name:
        case "limits":
            say(limits=LIMITS)
        case "hangs":
            say(row=make_row("before it hung", 1.0, "s"))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "dies":
            print("a fault", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            say(failed=name, error="Traceback\nValueError: not today")
            return False
        case "has no figure":
            say(missing={"name": "a figure", "reason": "nobody has it"})
        case _:
            say(row=make_row(name, (limits or {}).get("copy_bytes_per_s", 0.0), "B/s", bar=">=1"))
    return True


if __name__ == "__main__":
    main(Order.from_json(sys.argv[1]))
