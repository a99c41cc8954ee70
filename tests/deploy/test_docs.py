"""docs/observability.md names every metric that there is, and none that there is not."""

from __future__ import annotations

import re

from tests.deploy.test_rules_and_dashboard import DEPLOY
from tests.support.scrape import full_scrape

_SUFFIX = re.compile(r"_(bucket|count|sum|created)$")


def test_the_page_on_metrics_is_about_these() -> None:
    text = (DEPLOY.parent / "docs" / "observability.md").read_text()
    named = set(re.findall(r"`(epd_\w+)", text))
    there = {_SUFFIX.sub("", name) for name in full_scrape() if name.startswith("epd_")}
    counters = {name.removesuffix("_total") for name in there if name.endswith("_total")}
    assert named == there - counters  # a counter's time of creation has the name without _total
