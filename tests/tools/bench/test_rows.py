from __future__ import annotations

import pytest

from tools.bench.rows import make_row, meets_bar, render


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (">=1.5", True),
        (">= 1.6", False),
        ("<=1.5", True),
        ("<= 1.4", False),
        ("<1.5", False),
        ("<1.6", True),
        (">1.5", False),
        (">1.4", True),
    ],
)
def test_a_bar_asks_something_of_the_ratio(bar: str, met: bool) -> None:
    assert meets_bar(make_row("x", 3.0, "s", baseline=2.0, bar=bar)) is met


def test_a_bar_asks_something_of_a_value_without_baseline() -> None:
    assert meets_bar(make_row("x", 0.9, "ms", bar="<1")) is True
    assert meets_bar(make_row("x", 1.1, "ms", bar="<1")) is False


def test_no_bar_asks_nothing() -> None:
    assert meets_bar(make_row("x", 1.0, "ms")) is None


@pytest.mark.parametrize("bar", ["1.5", "about 2", ">=x", "<"])
def test_a_bar_that_says_nothing_is_a_mistake(bar: str) -> None:
    with pytest.raises(ValueError, match="no bar"):
        meets_bar(make_row("x", 1.0, "ms", bar=bar))


def test_the_table_shows_what_falls_short() -> None:
    rows = [
        make_row("fast", 30.0, "tokens/s", baseline=10.0, bar=">=1.5"),
        make_row("slow", 12_345.6, "ms", baseline=10_000.0, bar="<1", note="why"),
        make_row("plain", 0.12345, "s"),
    ]
    lines = render(rows).splitlines()
    assert lines[2].split() == ["fast", "30", "tokens/s", "10", "3", ">=1.5", "met"]
    assert lines[3].split() == ["slow", "12,346", "ms", "10,000", "1.235", "<1", "SHORT"]
    assert lines[4].split() == ["plain", "0.1235", "s", "-", "-"]
    assert lines[-1] == "  slow: why"
