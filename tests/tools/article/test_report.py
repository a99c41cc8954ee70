"""The article's table: ratios the right way round, what was computed marked, what is doubtful said."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import msgspec
import pytest

from tests.emulated.profiles import PROFILE
from tools.article.cell import Cell
from tools.article.report import Result, Setting, as_json, doubts, markdown, ratio, ratio_table, seconds, table

OLD = Cell("colocated, prefill first", "1 image", 2.8, 2.5, 5.0, 0.5, 0.03, 12.6, 0.65, 48.0, False, 100, 0, 0.0)
NEW = Cell("epd 1:1:1", "1 image", 0.9, 0.8, 1.5, 0.05, 0.01, 29.1, 0.89, 128.0, False, 100, 0, 0.0)
SETTING = Setting(PROFILE, 3, 2.0, "TTFT 1 s", 64, "python -m tools.article")
RESULTS = (Result(NEW, 128, is_baseline=False, is_auto=True), Result(OLD, 128, is_baseline=True))


def test_the_articles_own_figures_give_its_own_ratios() -> None:
    rows = [line for line in ratio_table(SETTING, RESULTS).splitlines() if line.startswith("| 1 image")]
    assert rows == ["| 1 image | epd 1:1:1 | colocated, prefill first | 3.11x | 2.31x | 65 -> 89 % | 2.67x | 10.00x |"]
    assert "| the article | E, P, D apart | one colocated service | 3.1x | 2.3x | 65 -> 89 % | 2.7x | - |" in ratio_table(
        SETTING, RESULTS
    )


def test_the_best_of_a_workload_is_bold_also_when_it_is_a_baseline() -> None:
    wins = replace(OLD, requests_per_s=40.0)
    lines = table(SETTING, [Result(wins, 128, is_baseline=True), RESULTS[0]]).splitlines()
    baseline, epd = lines[2], lines[3]
    assert "**40.0**" in baseline
    assert "**" not in baseline.replace("**40.0**", "")
    assert epd.count("**") == 6  # TTFT, ITL and sessions
    assert "epd 1:1:1 (auto)" in epd


def test_what_was_computed_is_marked_everywhere() -> None:
    text = markdown(SETTING, RESULTS)
    assert text.count("roofline, not measured") == 2  # each table
    assert "ROOFLINE, NOT MEASURED" in text
    measured = replace(SETTING, profile=msgspec.structs.replace(PROFILE, provenance="measured"))
    assert "roofline" not in markdown(measured, RESULTS).lower()
    assert as_json(SETTING, RESULTS, machine={}, date="")["profile"]["provenance"] == "roofline"


def test_a_run_that_is_not_to_be_trusted_says_so() -> None:
    slow = Result(replace(NEW, doubts=["gateway: event loop late"], failures=2), 128, is_baseline=False)
    assert doubts(RESULTS) == []
    assert len(doubts([slow])) == 2
    assert "Not to be trusted" in markdown(SETTING, [slow])
    assert "Not to be trusted" not in markdown(SETTING, RESULTS)
    assert not as_json(SETTING, [slow], machine={}, date="")["is_trusted"]
    assert "epd 1:1:1 *" in table(SETTING, [slow])


def test_what_is_not_known_is_no_number() -> None:
    empty = Result(replace(NEW, ttft_mean_s=math.nan), 1, is_baseline=False)
    json.dumps(as_json(SETTING, [empty], machine={}, date=""), allow_nan=False)
    assert seconds(math.nan) == "-"
    assert (seconds(1.234), seconds(0.0123)) == ("1.23 s", "12 ms")


@pytest.mark.parametrize(
    ("new", "old", "options", "text"),
    [
        (4.0, 2.0, {}, "2.00x"),
        (4.0, 0.0, {}, "from 0"),
        (0.0, 0.0, {}, "-"),
        (4.0, 2.0, {"at_least": True}, ">= 2.00x"),
        (4.0, 2.0, {"at_most": True}, "<= 2.00x"),
        (4.0, 2.0, {"at_least": True, "at_most": True}, "both open"),
    ],
)
def test_ratios(new: float, old: float, options: dict[str, bool], text: str) -> None:
    assert ratio(new, old, **options) == text
