from __future__ import annotations

import json

from tools.bench.rows import make_row
from tools.gpu_check import report
from tools.gpu_check.findings import Findings
from tools.gpu_check.tests_of import TestGroup

GPU = {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "driver": "580.1", "versions": {"torch": "2.11.0"}}


def findings() -> Findings:
    return Findings(
        rows=[
            make_row("speed", 3.0, "GB/s", baseline=4.0, bar=">=0.7"),
            make_row("time", 200.0, "us", bar="<150", note="by hand"),
            make_row("size", 1.0, "GB"),
        ],
        missing={"a figure": "nobody has it\nfor long"},
        broken={"vision": "Traceback\nValueError: not today"},
        limits={"flop_per_s": 1.0},
        tests=[TestGroup("gpu", 5, 1, 0, 2, 12.0, (("tests/x.py::test_y", "assert 1 == 2"),)), TestGroup("model", 7)],
    )


def test_everything_is_in_the_json() -> None:
    tree = json.loads(
        json.dumps(report.as_json(findings(), GPU, date="2026-11-23", commit="abc", command="python", seconds=12.34))
    )
    assert (tree["date"], tree["commit"], tree["seconds"]) == ("2026-11-23", "abc", 12.3)
    assert tree["device"] == {"name": GPU["name"], "driver": "580.1"}  # what names a single device is nobody's business
    assert tree["versions"] == {"torch": "2.11.0"}
    assert tree["limits"] == {"flop_per_s": 1.0}
    assert [(row["name"], row["ratio"], row["met"]) for row in tree["rows"]] == [
        ("speed", 0.75, True),
        ("time", None, False),
        ("size", None, None),
    ]
    assert tree["broken"] == {"vision": "Traceback\nValueError: not today"}
    assert tree["tests"][0]["failures"] == [{"test": "tests/x.py::test_y", "message": "assert 1 == 2"}]


def test_the_table_has_what_is_missing_below_it() -> None:
    text = report.as_text(findings())
    assert "SHORT" in text
    assert "  a figure: nobody has it ... for long\n" in text
    assert "  vision: ValueError: not today" in text
    assert "  gpu: 5 passed, 1 failed, 0 errors, 2 skipped in 12 s" in text
    assert "    tests/x.py::test_y: assert 1 == 2" in text


def test_a_bar_that_is_missed_is_a_result_and_a_test_that_fails_is_not() -> None:
    found = findings()
    assert report.verdict(found) == (
        "3 figures: 1 meet their bar, 1 fall short of it; 12 tests passed, not good: gpu; 1 figures missing, 1 parts broken"
    )
    assert not report.is_good(found)
    found.broken.clear()
    assert not report.is_good(found)
    found.tests = found.tests[1:]
    assert report.is_good(found)
    found.tests = [TestGroup("model")]  # nothing ran
    assert not report.is_good(found)


def test_a_device_is_a_file_name() -> None:
    assert report.slug(GPU) == "nvidia-h100-80gb-hbm3"
