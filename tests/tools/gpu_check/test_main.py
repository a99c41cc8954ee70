"""The command as a whole: without a GPU for real, and with one that is only said to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.gpu_check import scripted
from tools.gpu_check import __main__ as command
from tools.gpu_check.__main__ import GROUPS, PARTS, PROFILE_S, TESTS_S, TOTAL_S, Check, main
from tools.gpu_check.budget import Budget
from tools.gpu_check.device import NEEDED, NoGpu, find_gpu, lines
from tools.gpu_check.findings import Findings
from tools.gpu_check.supervise import ROOT, Group, Part
from tools.gpu_check.tests_of import TestGroup

GPU = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-1",
    "capability": "9.0",
    "num_multiprocessors": 132,
    "total_bytes": 80 << 30,
    "free_bytes": 79 << 30,
    "driver": "580.1",
    "cuda": "13.0",
    "kernels": "triton",
    "dtype": "bfloat16",
    "versions": {"torch": "2.11.0"},
}


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    result = shell("bash", "tools/gpu_check/run.sh", str(tmp_path), "--quick")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("gpu-check: no GPU to check: UnknownDevice: no CUDA device")
    assert result.stderr.endswith("Nothing was measured and nothing is written.\n")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_simulator_is_no_gpu() -> None:
    result = shell(sys.executable, "-m", "tools.gpu_check", NUMBA_ENABLE_CUDASIM="1")
    assert result.returncode == 2
    assert "Numba's simulator is no GPU" in result.stderr


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu_check.device.find_spec", lambda name: None if name in ("msgspec", "tqdm") else object())
    with pytest.raises(NoGpu, match=r"^msgspec, tqdm cannot be imported by"):
        find_gpu()
    assert "torch" in NEEDED


def test_wrong_use_is_told() -> None:
    assert shell("bash", "tools/gpu_check/run.sh").returncode == 64
    result = shell(sys.executable, "-m", "tools.gpu_check", "--only", "no such part")
    assert result.returncode == 2
    assert "invalid choice" in result.stderr


def test_what_is_printed_of_a_gpu() -> None:
    first, second, third = lines(GPU)
    assert first == "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 multiprocessors, 79.0 of 80.0 GiB free"
    assert second == "driver 580.1, CUDA 13.0, triton kernels, bfloat16"
    assert third == "torch 2.11.0"


def test_all_of_it_is_ten_minutes_at_most() -> None:
    """And what has a place in every run has room for it, whatever the parts before take."""
    assert TOTAL_S < 600
    figures = GROUPS["figures"]
    measured_s = figures.start_s + sum(part.limit_s for part in figures.parts[:6])
    assert TESTS_S + measured_s < TOTAL_S - 60
    assert PROFILE_S < TOTAL_S


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Over scripted parts, of everything that there is."""
    monkeypatch.setattr(command, "run_tests", lambda limit_s, start: [TestGroup("gpu", 3, 1, problems=(("a test", "why"),))])
    groups = {
        "figures": Group((Part("limits", 60), Part("decode", 60), Part("ipc", 60)), "", 60),
        "serving": Group((Part("serving", 60),), "", 60),
        "transformers": Group((Part("transformers", 60),), "", 60),
    }
    wanted = frozenset({"tests", *groups})
    return Check(dict(GPU), "folder", Budget(500, time.monotonic), wanted, tmp_path, groups=groups, child=scripted.COMMAND)


def test_a_run_has_all_parts_and_keeps_what_it_has_after_each(check: Check) -> None:
    kept: list[int] = []
    check.write = lambda findings: kept.append(len(findings.rows))
    findings = check.run()
    assert [(row["name"], row["value"]) for row in findings.rows] == [
        *(("decode", 2e9), ("ipc", 2e9)),
        *(("serving", 2e9), ("transformers", 2e9)),
    ]
    assert kept == [0, 2, 3, 4]
    assert findings.broken == {}
    assert "=== tests, gpu: 3 passed" in check.log.read_text()


@pytest.mark.parametrize("name", ["ipc", "transformers"])
def test_one_part_alone_brings_its_limits(check: Check, name: str) -> None:
    findings = replace(check, wanted=frozenset({name})).run()
    assert [(row["name"], row["value"]) for row in findings.rows] == [(name, 2e9)]
    assert set(findings.seconds) == {"limits", name}


def test_serving_needs_none(check: Check) -> None:
    findings = replace(check, wanted=frozenset({"serving"})).run()
    assert set(findings.seconds) == {"serving"}


def test_without_time_all_of_it_is_said_to_be_left_out(check: Check) -> None:
    findings = replace(check, budget=Budget(0, time.monotonic), wanted=check.wanted | {"profile"}).run()
    assert set(findings.broken) == {"tests", "limits", "decode", "ipc", "serving", "transformers", "profile"}
    assert set(findings.broken.values()) == {"not begun: no time was left"}


def test_the_command_writes_one_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(check: Check) -> Findings:
        assert check.wanted == {"decode"}
        check.findings.take({"row": {"name": "speed", "value": 1.0, "unit": "", "baseline": None, "ratio": None, "bar": ""}})
        return check.findings

    monkeypatch.setattr(command, "find_gpu", lambda: dict(GPU))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Check, "run", run)
    assert main(["--only", "decode", "--out", str(tmp_path / "out"), "--commit", "abc"]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.endswith("-nvidia-h100-80gb-hbm3.json")
    tree = json.loads(path.read_text())
    assert (tree["commit"], tree["rows"][0]["name"]) == ("abc", "speed")
    assert "python -m tools.gpu_check --only decode" in tree["command"]
    assert str(path) in capsys.readouterr().out


def test_a_quick_run_leaves_out_what_takes_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted: list[frozenset[str]] = []

    def run(check: Check) -> Findings:
        wanted.append(check.wanted)
        assert check.is_quick
        return check.findings

    monkeypatch.setattr(command, "find_gpu", lambda: dict(GPU))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Check, "run", run)
    main(["--quick", "--out", str(tmp_path)])
    assert wanted == [frozenset({"tests", "limits", "decode", "linear", "experts", "prefill", "attention", "vision", "ipc"})]
    assert wanted[0] < set(PARTS)
