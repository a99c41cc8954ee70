"""Groups of tests as processes: what is read back from those that end, and from those that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

import pytest

from tools.gpu_check import tests_of
from tools.gpu_check.supervise import ROOT, popen
from tools.gpu_check.tests_of import GROUPS, TestGroup, pytest_command, read_junit, read_lines, run_tests

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_a" name="test_good" time="0.1"/>
<testcase classname="tests.gpu.test_a" name="test_bad[1]" time="0.1"><failure message="assert 1 == 2">long</failure></testcase>
<testcase classname="tests.gpu.test_a" name="test_broken" time="0.1"><error message="fixture"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_skipped" time="0.1"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_junit_is_read_back() -> None:
    assert read_junit("gpu", JUNIT, 3.0) == TestGroup(
        *("gpu", 1, 1, 1, 1, 3.0),
        problems=(("tests/gpu/test_a::test_bad[1]", "assert 1 == 2"), ("tests/gpu/test_a::test_broken", "fixture")),
    )


def test_nothing_to_run_is_not_good() -> None:
    group = read_junit("gpu", '<testsuites><testsuite name="pytest"/></testsuites>', 1.0)
    assert group.problem == "there was nothing to run"
    assert not group.is_good


def test_lines_of_one_that_was_killed() -> None:
    output = "tests/a.py::test_b PASSED   [ 10%]\ntests/a.py::test_c[x y] FAILED [ 20%]\ntests/a.py::test_d "
    assert read_lines("gpu", output, 2.0, "stopped") == TestGroup(
        *("gpu", 1, 1, 0, 0, 2.0), problems=(("tests/a.py::test_c[x y]", ""),), problem="stopped"
    )


def test_groups_name_what_is_there() -> None:
    for paths in GROUPS.values():
        assert all((ROOT / path).exists() for path in paths if path != "--ignore")


SUITE = """
import pytest, time, os
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
def test_bad(): assert 1 == 2
def test_other(): assert False
"""


def run(tmp_path: Path, texts: dict[str, str], *, limit_s: float = 100.0) -> list[TestGroup]:
    def start(command: Sequence[str], output: Path) -> subprocess.Popen[str]:
        with output.open("w") as file:
            return popen([*command, "-c", str(tmp_path / "pytest.ini"), "-p", "no:randomly"], stdout=file, stderr=file)

    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    groups = {}
    for name, text in texts.items():
        (tmp_path / f"test_{name}.py").write_text(text)
        groups[name] = (str(tmp_path / f"test_{name}.py"),)
    return run_tests(limit_s, start, groups=groups)


def test_groups_run_side_by_side_and_only_what_needs_a_gpu(tmp_path: Path) -> None:
    one, other = run(tmp_path, {"one": SUITE, "other": "raise ImportError('no such module')"})
    assert (one.passed, one.failed, one.errors, one.problem) == (1, 1, 0, "")
    assert one.problems[0][0].endswith("test_one::test_bad")
    assert one.problems[0][1] == "assert 1 == 2"
    assert (other.passed, other.errors) == (0, 1)
    assert not other.is_good


def test_one_that_overruns_says_what_it_had(tmp_path: Path) -> None:
    """The limit begins when the process does what it will not end."""

    def start(command: Sequence[str], output: Path) -> subprocess.Popen[str]:
        script = "print('tests/a.py::test_b PASSED [ 10%]', flush=True); print('now', flush=True); import time; time.sleep(600)"
        process = popen([sys.executable, "-c", script], stdout=PIPE)
        assert process.stdout is not None
        output.write_text(process.stdout.readline())
        assert process.stdout.readline() == "now\n"
        return process

    (group,) = run_tests(0.1, start, groups={"one": ("tests/a.py",)})
    assert group.problem == "stopped after 0 s"
    assert (group.passed, group.failed) == (1, 0)


def test_without_pytest_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests_of, "find_spec", lambda name: None if name == "hypothesis" else object())

    def start(command: Sequence[str], output: Path) -> subprocess.Popen[str]:
        raise AssertionError(command)

    groups = run_tests(1.0, start)
    assert {group.problem for group in groups} == {"not run: hypothesis cannot be imported here; install the extra `test`"}


@pytest.mark.parametrize("is_there", [True, False])
def test_what_stands_in_for_plugins(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    monkeypatch.setattr(tests_of, "find_spec", lambda name: object() if is_there or name != "pytest_asyncio" else None)
    assert ("tools.gpu_check.stand_in" in pytest_command(["tests/gpu"], Path("x.xml"))) is not is_there


def test_asynchronous_tests_run_without_the_plugin_for_them() -> None:
    """Those of one file with this project's own settings, in a process that has neither pytest-asyncio nor pytest-timeout."""
    code = (
        "import sys; sys.modules['pytest_asyncio'] = sys.modules['pytest_timeout'] = None; import pytest; "
        "sys.exit(pytest.main(['-p', 'tools.gpu_check.stand_in', '-p', 'no:cacheprovider', 'tests/test_stream.py']))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
