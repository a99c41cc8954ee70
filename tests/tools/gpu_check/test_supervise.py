"""Parts that end, fail, hang and take their process with them: the others are run all the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tools.gpu_check.scripted import COMMAND
from tools.gpu_check.budget import Budget
from tools.gpu_check.findings import Findings
from tools.gpu_check.order import Order
from tools.gpu_check.supervise import Group, Part, run_group


class Run:
    def __init__(self, folder: Path, names: Sequence[str], *, opener: str = "", total_s: float = 100.0, start_s: float = 60.0):
        self.findings = Findings()
        self.orders: list[Order] = []
        self.said: list[str] = []
        limits = {"hangs": 0.5}
        group = Group(tuple(Part(name, limits.get(name, 60.0)) for name in names), opener, start_s, grace_s=0.2)
        budget = Budget(total_s, time.monotonic)
        run_group(group, budget, self.findings, self._order, log=folder / "log", say=self.said.append, command=COMMAND)
        self.log = (folder / "log").read_text() if (folder / "log").exists() else ""

    def _order(self, group: Group, parts: Sequence[str], seconds: float) -> Order:
        self.orders.append(Order(opener=group.opener, parts=parts, limits=self.findings.limits, seconds=seconds))
        return self.orders[-1]


def test_parts_that_end(tmp_path: Path) -> None:
    run = Run(tmp_path, ["limits", "one", "has no figure", "two"])
    assert [row["name"] for row in run.findings.rows] == ["one", "two"]
    assert run.findings.limits == {"copy_bytes_per_s": 2e9, "read_bytes_per_s": 1e9, "flop_per_s": 4e12}
    assert run.findings.missing == {"a figure": "nobody has it"}
    assert run.findings.broken == {}
    assert run.findings.seconds == dict.fromkeys(["limits", "one", "has no figure", "two"], 0.25)
    assert len(run.orders) == 1


def test_one_that_fails_ends_itself_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, ["raises", "one"])
    assert run.findings.broken == {"raises": "Traceback\nValueError: not today"}
    assert [row["name"] for row in run.findings.rows] == ["one"]
    assert "raises: ValueError: not today" in run.said
    assert len(run.orders) == 1


def test_one_that_hangs_is_killed_and_the_next_begins_anew_with_what_is_known(tmp_path: Path) -> None:
    run = Run(tmp_path, ["limits", "hangs", "one"])
    assert run.findings.broken.keys() == {"hangs"}
    assert "stopped after" in run.findings.broken["hangs"]
    assert [(row["name"], row["value"]) for row in run.findings.rows] == [("before it hung", 1.0), ("one", 2e9)]
    assert [order.parts for order in run.orders] == [["limits", "hangs", "one"], ["one"]]


def test_one_that_takes_its_process_with_it(tmp_path: Path) -> None:
    run = Run(tmp_path, ["dies", "one"])
    assert "status -9" in run.findings.broken["dies"]
    assert "a fault" in run.findings.broken["dies"]
    assert [row["name"] for row in run.findings.rows] == ["one"]


def test_a_process_that_cannot_begin_is_not_tried_for_every_part(tmp_path: Path) -> None:
    run = Run(tmp_path, ["one", "two"], opener="broken")
    assert set(run.findings.broken) == {"one", "two"}
    assert "cannot be opened" in run.findings.broken["two"]
    assert len(run.orders) == 1


@pytest.mark.parametrize("opener", ["cannot", "silent"])
def test_one_that_ends_without_a_word_or_never_says_one(tmp_path: Path, opener: str) -> None:
    run = Run(tmp_path, ["one"], opener=opener, start_s=0.5 if opener == "silent" else 60.0)
    reason = run.findings.broken["one"]
    assert ("status 7" in reason and "no such thing" in reason) if opener == "cannot" else "stopped after" in reason


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    run = Run(tmp_path, ["one", "two"], total_s=0.0)
    assert run.findings.broken == dict.fromkeys(["one", "two"], "not begun: no time was left")
    assert run.orders == []
