"""Runs parts in a process of their own and sees to it that each ends: one that overruns is killed, and the next ones start anew.

Owns the processes. Does not know what is measured.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tools.gpu_check.budget import Budget
from tools.gpu_check.findings import Findings
from tools.gpu_check.order import Order

ROOT = Path(__file__).resolve().parents[2]
CHILD = (sys.executable, "-m", "tools.gpu_check.child")
_TAIL = 1500  # characters of what a process that died had said


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    limit_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that share a process; how long that may take to be ready for one, and to end when it is told to."""

    parts: tuple[Part, ...]
    opener: str
    start_s: float = 60.0
    grace_s: float = 2.0


Progress = Callable[[str], None]


def run_group(
    group: Group,
    budget: Budget,
    findings: Findings,
    make_order: Callable[[Group, Sequence[str], float], Order],
    *,
    log: Path,
    say: Progress,
    command: Sequence[str] = CHILD,
) -> None:
    """Every part ends up in `findings`: with what it found, and with why it did not end if it did not.

    `make_order` is asked anew for every process, with the parts that are left and the seconds there are.
    """
    left = list(group.parts)
    while left:
        seconds = budget.grant(group.start_s + sum(part.limit_s for part in left))
        if not seconds:
            for part in left:
                findings.broken[part.name] = "not begun: no time was left"
                say(f"{part.name}: {findings.broken[part.name]}")
            return
        order = make_order(group, [part.name for part in left], seconds)
        with log.open("a") as file:
            left = _Watch(group, left, budget, findings, say).run([*command, order.to_json()], file, log)


class _Watch:
    """One process, from its start to its end."""

    def __init__(self, group: Group, parts: list[Part], budget: Budget, findings: Findings, say: Progress) -> None:
        self._group = group
        self._left = parts  # the first is the one that is on, or the next
        self._budget = budget
        self._findings = findings
        self._say = say
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def run(self, command: Sequence[str], errors: IO[str], log: Path) -> list[Part]:
        """The parts that are left for another process."""
        errors.write(f"\n=== {', '.join(part.name for part in self._left)}\n")
        errors.flush()
        size_before = log.stat().st_size
        with popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
            reader.start()
            try:
                reason = self._follow()
            finally:
                end(process, self._group.grace_s)
                reader.join()
            if reason is None and self._left:
                tail = log.read_text(errors="replace")[size_before:][-_TAIL:]
                reason = f"its process ended with status {process.returncode}: {tail.strip()}"
        if reason is not None and self._left:
            self._break(reason)
        return self._left

    def _read(self, output: IO[str]) -> None:
        for line in output:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                self._events.put(event)
        self._events.put(None)

    def _follow(self) -> str | None:
        """Until all parts are through, or the process is (None), or a part has taken too long (why)."""
        limit_s = self._group.start_s
        while self._left:
            granted = self._budget.grant(limit_s)
            until = time.monotonic() + granted
            while True:
                try:
                    event = self._events.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    return f"stopped after {granted:.0f} s" + (": no time was left" if granted < limit_s else "")
                if event is None:
                    return None
                self._findings.take(event)
                if "begin" in event:
                    limit_s = self._left[0].limit_s
                    self._say(f"{self._left[0].name} ...")
                    break
                if "end" in event:
                    self._findings.seconds[event["end"]] = event["seconds"]
                    self._say(f"{event['end']}: {event['seconds']:.1f} s")
                    self._left = self._left[1:]
                    limit_s = self._group.start_s
                    break
                if "failed" in event:
                    if event.get("all"):
                        self._break_all(event["error"])
                        return None
                    self._break(event["error"])
                    limit_s = self._group.start_s
                    break
        return None

    def _break(self, reason: str) -> None:
        part = self._left[0]
        self._findings.broken[part.name] = reason
        self._say(f"{part.name}: {reason.strip().splitlines()[-1]}")
        self._left = self._left[1:]

    def _break_all(self, reason: str) -> None:
        while self._left:
            self._break(reason)


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A process at the head of a group of its own, in the root of the checkout, that finds our packages there."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment, start_new_session=True, **options
    )


def end(process: subprocess.Popen[str], grace_s: float = 2.0) -> None:
    """With all that it has started: it is asked to, then killed."""
    if process.poll() is None:
        try:
            process.wait(timeout=0.5)  # it may be about to
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
