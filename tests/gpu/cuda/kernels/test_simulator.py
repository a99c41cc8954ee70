"""cases/ in the CUDA simulator: one process for all files, one test for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

_ROOT = Path(__file__).parents[4]
_CASES = Path(__file__).parent / "cases"
_FILES = sorted(path.stem for path in _CASES.glob("test_*.py"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ElementTree.Element:
    """What pytest reports of all cases."""
    report = tmp_path_factory.mktemp("simulator") / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={report}", str(_CASES)]
    ended = subprocess.run(
        command,
        cwd=_ROOT,
        env={**environment, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert report.exists(), ended.stdout + ended.stderr
    return ElementTree.parse(report).getroot()


@pytest.mark.parametrize("file", _FILES)
def test_cases(results: ElementTree.Element, file: str) -> None:
    cases = [case for case in results.iter("testcase") if case.get("classname", "").endswith(f".{file}")]
    assert cases, f"nothing ran of {file}: {ElementTree.tostring(results, encoding='unicode')[:2000]}"
    failed = {case.get("name"): found.text for case in cases for found in case if found.tag in ("failure", "error", "skipped")}
    assert not failed, "\n\n".join(f"{name}\n{text}" for name, text in failed.items())
