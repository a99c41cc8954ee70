from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import main
from tools.bench.apart import run_apart

FAKES = "tests.tools.bench.fakes"


def test_rows_of_all_benchmarks_end_up_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    assert main(["good", "report", "--out", str(path)], package=FAKES) == 0
    result = json.loads(path.read_text())
    assert [(row["name"], row["ratio"], row["met"]) for row in result["rows"]] == [
        ("speed", 1.5, False),
        ("size", None, None),
        ("reported", None, True),
    ]
    assert result["machine"]["cores"] >= 1
    assert result["broken"] == {}
    assert "3 figures, 1 short of their bar, 0 benchmarks broken" in capsys.readouterr().out


def test_a_broken_benchmark_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["raising", "good", "--out", str(path)], package=FAKES) == 1
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 2
    assert "no peer to compare with" in result["broken"]["raising"]


def test_a_benchmark_that_dies_is_told() -> None:
    assert run_apart(f"{FAKES}.dying") == ([], f"{FAKES}.dying died with status 3")
