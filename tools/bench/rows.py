"""What a benchmark reports: rows of one table, each a figure, what it is compared with and what is asked of it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

_HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


class Row(TypedDict):
    """One figure. `ratio` is value / baseline, both measured in the same run.

    `bar` says what is asked, of the ratio or, where there is none, of the value: ">=1.5", "<=2", "<1"; "" asks nothing.
    """

    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    bar: str
    note: NotRequired[str]  # what the baseline is, or why the figure falls short


def make_row(name: str, value: float, unit: str, *, baseline: float | None = None, bar: str = "", note: str = "") -> Row:
    """A row whose ratio follows from its value and baseline."""
    ratio = value / baseline if baseline else None
    return Row(name=name, value=value, unit=unit, baseline=baseline, ratio=ratio, bar=bar, note=note)


def meets_bar(row: Row) -> bool | None:
    """Whether the row does what is asked of it; None where nothing is asked.

    Raises:
        ValueError: the bar is not written as `Row` says.
    """
    if not row["bar"]:
        return None
    match = re.fullmatch(r"\s*(<=|>=|<|>)\s*(\d+(?:\.\d+)?)\s*", row["bar"])
    if not match:
        raise ValueError(f"{row['name']}: {row['bar']!r} is no bar like '>=1.5'")
    figure = row["value"] if row["ratio"] is None else row["ratio"]
    return _HOLDS[match[1]](figure, float(match[2]))


def render(rows: Sequence[Row]) -> str:
    """The table for people; notes below it."""
    header = ("what", "value", "unit", "baseline", "ratio", "bar", "")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            text.ljust(width) if column in (0, 2, 5, 6) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    notes = [f"  {row['name']}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *(["", "notes:", *notes] if notes else [])])


def _cells(row: Row) -> tuple[str, ...]:
    verdict = {True: "met", False: "SHORT", None: ""}[meets_bar(row)]
    return (row["name"], _short(row["value"]), row["unit"], _short(row["baseline"]), _short(row["ratio"]), row["bar"], verdict)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
