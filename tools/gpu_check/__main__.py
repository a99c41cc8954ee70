"""python -m tools.gpu_check: tests and figures of the GPU of this machine, in ten minutes at most.

Each part runs in processes of its own under a limit of its own; one that fails or overruns is told and the next one begins. What
has been found is written after every part, so that a run that is cut short leaves what it had. Installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.machine import describe_machine
from tools.gpu_check import report
from tools.gpu_check.budget import Budget
from tools.gpu_check.device import NoGpu, find_gpu, lines
from tools.gpu_check.findings import Findings
from tools.gpu_check.order import Order
from tools.gpu_check.supervise import CHILD, ROOT, Group, Part, end, popen, run_group
from tools.gpu_check.tests_of import TestGroup, run_tests

NO_GPU_STATUS = 2
TOTAL_S = 570.0  # of the ten minutes: the rest is for whoever starts and reads it
TESTS_S = 130.0
PROFILE_S = 60.0
_OPENERS = "tools.gpu_check.child"

GROUPS: dict[str, Group] = {
    "figures": Group(
        (
            Part("limits", 20),
            Part("decode", 80),
            Part("linear", 20),
            Part("experts", 25),
            Part("prefill", 60),
            Part("attention", 60),
            Part("vision", 45),
            Part("ipc", 30),
            Part("launches", 25),
            Part("loading", 40),
        ),
        f"{_OPENERS}:open_device_rig",
        start_s=45,
    ),
    "serving": Group((Part("serving", 165),), f"{_OPENERS}:open_serving", start_s=15, grace_s=10),
    "transformers": Group((Part("transformers", 120),), f"{_OPENERS}:open_peer_rig", start_s=45),
}
PARTS = ("tests", *GROUPS, *(part.name for part in GROUPS["figures"].parts), "profile")
_QUICK_LOADS: dict[str, Any] = {"decode_steps": 20, "rounds": 5}
_QUICK_LEAVES_OUT = {"loading", "launches", "transformers", "serving", "profile"}


@dataclass
class Check:
    """One run. `write` is called whenever there is more to be kept."""

    gpu: dict[str, Any]
    folder: str  # of the model
    budget: Budget
    wanted: frozenset[str]
    out: Path
    is_quick: bool = False
    groups: dict[str, Group] = field(default_factory=lambda: dict(GROUPS))
    child: Sequence[str] = CHILD
    findings: Findings = field(default_factory=Findings)
    write: Callable[[Findings], None] = lambda findings: None

    @property
    def log(self) -> Path:
        return self.out / "gpu-check.log"

    def run(self) -> Findings:
        if "tests" in self.wanted:
            self._tests()
        for name, group in self.groups.items():
            parts = tuple(part for part in group.parts if name in self.wanted or part.name in self.wanted)
            if not parts:
                continue
            if self.findings.limits is None and parts[0].name != "limits" and name != "serving":
                parts = (*self._limits(name), *parts)
            chosen = Group(parts, group.opener, group.start_s, group.grace_s)
            self._measure(chosen)
            self.write(self.findings)
        if "profile" in self.wanted:
            self._profile()
        return self.findings

    def _limits(self, name: str) -> tuple[Part, ...]:
        """What everything is held against is measured in the same run, whatever was asked for."""
        group, limits = self.groups["figures"], self.groups["figures"].parts[0]
        if name == "figures":
            return (limits,)
        alone = Group((limits,), group.opener, group.start_s, group.grace_s)
        self._measure(alone)
        return ()

    def _measure(self, group: Group) -> None:
        run_group(group, self.budget, self.findings, self._order, log=self.log, say=_say, command=self.child)

    def _order(self, group: Group, parts: Sequence[str], seconds: float) -> Order:
        return Order(
            opener=group.opener,
            parts=parts,
            folder=self.folder,
            loads=_QUICK_LOADS if self.is_quick else {},
            limits=self.findings.limits,
            device_uuid=self.gpu["uuid"],
            seconds=seconds - group.start_s,
        )

    def _tests(self) -> None:
        if not (granted := self.budget.grant(TESTS_S)):
            self.findings.broken["tests"] = "not begun: no time was left"
            return
        _say("tests ...")

        def start(command: Sequence[str], output: Path) -> subprocess.Popen[str]:
            with output.open("w") as file:
                return popen(command, stdout=file, stderr=subprocess.STDOUT)

        self.findings.tests = run_tests(granted, start)
        for group in self.findings.tests:
            _say(f"tests, {group.line()}")
        self._keep_failures(self.findings.tests)
        self.write(self.findings)

    def _keep_failures(self, groups: Sequence[TestGroup]) -> None:
        with self.log.open("a") as file:
            for group in groups:
                file.write(f"\n=== tests, {group.line()}\n{group.problem}\n")
                file.writelines(f"{test}\n{message}\n" for test, message in group.problems)

    def _profile(self) -> None:
        granted = self.budget.grant(PROFILE_S)
        if granted < PROFILE_S / 2:
            self.findings.broken["profile"] = "not begun: no time was left"
            return
        _say("profile ...")
        path = self.out / f"profile-{report.slug(self.gpu)}-{Path(self.folder).name}.json"
        command = [sys.executable, "-m", "tools.profile_device", "measure", "--device", "cuda", "--model", "qwen3-vl-8b"]
        with self.log.open("a") as file:
            process = popen([*command, "--output", str(path)], stdout=file, stderr=file)
            try:
                status: int | None = process.wait(timeout=granted)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end(process)
        if status == 0 and path.exists():
            self.findings.profile = path.name
        else:
            self.findings.broken["profile"] = (
                f"stopped after {granted:.0f} s" if status is None else f"ended with status {status}"
            )
        self.write(self.findings)


def main(argv: Sequence[str] | None = None) -> int:
    """Answers 0 when all ran and the tests passed, 1 when something did not, 2 when there is no GPU; bars do not count."""
    args = _parser().parse_args(argv)
    budget = Budget(args.seconds, time.monotonic)
    try:
        gpu = find_gpu()
    except NoGpu as error:
        print(f"gpu-check: no GPU to check: {error}. Nothing was measured and nothing is written.", file=sys.stderr)
        return NO_GPU_STATUS
    print("\n".join(lines(gpu)), flush=True)
    from tools.geometry import qwen3_vl_8b

    out = args.out or ROOT / "bench" / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{time.strftime('%Y-%m-%d')}-{report.slug(gpu)}{'-quick' if args.quick else ''}.json"
    commit = args.commit or os.environ.get("EPD_COMMIT", "") or str(describe_machine()["commit"])
    command = shlex.join(["python", "-m", "tools.gpu_check", *(sys.argv[1:] if argv is None else argv)])

    def write(findings: Findings) -> None:
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        tree = report.as_json(findings, gpu, date=date, commit=commit, command=command, seconds=budget.spent_s)
        path.write_text(json.dumps(tree, indent=2) + "\n")

    check = Check(gpu, str(qwen3_vl_8b()), budget, _wanted(args), out, is_quick=args.quick, write=write)
    findings = check.run()
    write(findings)
    print(f"\n{report.as_text(findings)}\n\n{report.verdict(findings)}; {budget.spent_s:.0f} s; kept in {path}", flush=True)
    return 0 if report.is_good(findings) else 1


def _wanted(args: argparse.Namespace) -> frozenset[str]:
    if args.only:
        return frozenset(args.only)
    whole = {"tests", "profile", *(part.name for group in GROUPS.values() for part in group.parts)}
    return frozenset(whole - _QUICK_LEAVES_OUT if args.quick else whole)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description="Run the GPU's tests and measure what the product does on the GPU of this machine, beside what it could do.",
        epilog=f"Parts: {', '.join(PARTS)}. Exit status: 0 all ran, 1 something did not or a test failed, 2 there is no GPU.",
    )
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help="this part alone; may be given again")
    parser.add_argument("--quick", action="store_true", help="tests and the figures of the kernels, fewer rounds")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, metavar="S", help=f"for everything ({TOTAL_S:.0f})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the JSON, the log and the profile (bench/results)")
    parser.add_argument("--commit", default="", help="what is checked, where git cannot be asked (or EPD_COMMIT)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended
    sys.exit(main())
