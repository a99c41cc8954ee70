"""The tests that need a GPU, in groups that run side by side: each in a process of its own, each with what is left of the time.

What a group says is read back from its JUnit file; of one that was killed, from the lines that it had printed by then.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

GROUPS: Mapping[str, tuple[str, ...]] = {
    "gpu": ("tests/gpu", "--ignore", "tests/gpu/cuda/kernels", "--ignore", "tests/gpu/cuda/triton"),
    "numba kernels": ("tests/gpu/cuda/kernels",),
    "triton kernels": ("tests/gpu/cuda/triton", "--ignore", "tests/gpu/cuda/triton/cases/test_experts.py"),
    "triton experts": ("tests/gpu/cuda/triton/cases/test_experts.py",),
    "model": ("tests/model",),
    "end to end": ("tests/e2e/test_gpu.py",),
}
NEEDED = ("pytest", "hypothesis", "transformers")  # to run any of them; what stands in for pytest's own plugins is here
_PLUGINS = ("pytest_asyncio", "pytest_timeout")
_TEST_TIMEOUT_S = 90
_MESSAGE = 300  # characters
_NOTHING_TO_RUN = 5  # pytest's status
_LINE = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TestGroup:
    """`problem`: why the group did not come to its end, "" if it did."""

    __test__ = False

    name: str
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problems: tuple[tuple[str, str], ...] = ()  # (test, short message) of what failed
    problem: str = ""

    @property
    def is_good(self) -> bool:
        return not (self.failed or self.errors or self.problem) and self.passed > 0

    def line(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.errors} errors, {self.skipped} skipped"
        return f"{self.name}: {counts} in {self.seconds:.0f} s" + (f"; {self.problem.splitlines()[-1]}" if self.problem else "")


Start = Callable[[Sequence[str], Path], "subprocess.Popen[str]"]


def run_tests(
    limit_s: float, start: Start, *, groups: Mapping[str, Sequence[str]] = GROUPS, folder: Path | None = None
) -> list[TestGroup]:
    """All groups at once. `start(command, output)` begins a process whose output goes to a file."""
    if lacking := [name for name in NEEDED if not find_spec(name)]:
        problem = f"not run: {', '.join(lacking)} cannot be imported here; install the extra `test`"
        return [TestGroup(name, problem=problem) for name in groups]
    with tempfile.TemporaryDirectory(prefix="epd-gpu-check-", dir=folder) as name:
        runs = [_Run(group, paths, Path(name), number, start) for number, (group, paths) in enumerate(groups.items())]
        until = time.monotonic() + limit_s
        return [run.finish(until, limit_s) for run in runs]


class _Run:
    def __init__(self, name: str, paths: Sequence[str], folder: Path, number: int, start: Start) -> None:
        self._name = name
        self._junit, self._output = folder / f"{number}.xml", folder / f"{number}.txt"
        self._started = time.monotonic()
        self._process = start(pytest_command(paths, self._junit), self._output)

    def finish(self, until: float, limit_s: float) -> TestGroup:
        from tools.gpu_check.supervise import end

        problem = ""
        try:
            self._process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        seconds = time.monotonic() - self._started
        end(self._process)
        output = self._output.read_text(errors="replace") if self._output.exists() else ""
        if not problem and self._junit.exists():
            return read_junit(self._name, self._junit.read_text(), seconds)
        if not problem:
            status = self._process.returncode
            problem = f"pytest ended with status {status}: {output[-800:].strip()}"
        return read_lines(self._name, output, seconds, problem)


def pytest_command(paths: Sequence[str], junit: Path) -> list[str]:
    """What setup.cfg asks of pytest's plugins is there to be asked also where one of these is not installed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if all(find_spec(name) for name in _PLUGINS):
        command += [f"--timeout={_TEST_TIMEOUT_S}", "--timeout-method=signal"]
    else:
        command += ["-p", "tools.gpu_check.stand_in"]
    return [*command, f"--junitxml={junit}", *paths]


def read_junit(name: str, text: str, seconds: float) -> TestGroup:
    """Raises xml.etree.ElementTree.ParseError for what is no XML."""
    counts = {"failure": 0, "error": 0, "skipped": 0}
    passed, problems = 0, []
    for case in ElementTree.fromstring(text).iter("testcase"):
        found = next((child for child in case if child.tag in counts), None)
        if found is None:
            passed += 1
            continue
        counts[found.tag] += 1
        if found.tag != "skipped":
            test = "::".join(filter(None, (case.get("classname", "").replace(".", "/"), case.get("name", ""))))
            problems.append((test, (found.get("message") or found.text or "").strip()[:_MESSAGE]))
    none = "" if passed or any(counts.values()) else "there was nothing to run"
    return TestGroup(name, passed, counts["failure"], counts["error"], counts["skipped"], seconds, tuple(problems), problem=none)


def read_lines(name: str, output: str, seconds: float, problem: str) -> TestGroup:
    """From what pytest printed until it ended."""
    outcomes = dict(_LINE.findall(output))
    count = list(outcomes.values()).count
    problems = tuple((test, "") for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    return TestGroup(name, count("PASSED"), count("FAILED"), count("ERROR"), count("SKIPPED"), seconds, problems, problem)
