"""The alert rules and the Grafana dashboard ask for what a scrape really has: names, labels, and values of labels.

What the files mean to Prometheus itself is checked by `make check-deploy`, which needs its binaries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from epd.errors import EpdError
from epd.gateway.alerts import RULES
from tests.support.scrape import ADDED_LABELS, full_scrape, grouped_labels, selectors

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS_ALONE = {"EpdGatewayDown", "EpdRecoverySlow"}
KNOWN_VALUES = {
    "role": {"encode", "prefill", "decode"},
    "slo": {"ttft", "tpot", "both"},
    "met": {"true", "false"},
    "job": {"epd"},
}


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "epd.json").read_text())
    return found


def _panel_expressions() -> Iterator[tuple[str, str]]:
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in _dashboard()["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in _dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], re.sub(r"label_values\((.*), *(\w+)\)", r"\1", variable["query"]["query"])


EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in _rules()] + list(_panel_expressions())


def _wire_codes(cls: type[EpdError] = EpdError) -> set[str]:
    return {cls.code}.union(*(_wire_codes(sub) for sub in cls.__subclasses__()))


@pytest.mark.parametrize("expression", [expression for _, expression in EXPRESSIONS], ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_asks_for_what_is_there(expression: str) -> None:
    scrape = full_scrape()
    found = list(selectors(expression))
    assert found
    for selector in found:
        assert selector.name in scrape, selector.name
        labels = scrape[selector.name] | ADDED_LABELS
        for label, operator, value in selector.matchers:
            assert label in labels, (selector.name, label)
            known = _values(label)
            if known is not None and operator in ("=", "!="):
                assert value in known, (selector.name, label, value)
            if known is not None and operator in ("=~", "!~"):
                assert set(value.split("|")) <= known, (selector.name, label, value)
    every_label = frozenset().union(*(scrape[selector.name] for selector in found)) | ADDED_LABELS
    assert grouped_labels(expression) <= every_label


def _values(label: str) -> set[str] | None:
    if label in ("outcome", "code"):
        return _wire_codes() | {"ok"}
    return KNOWN_VALUES.get(label)


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "action"}
    kept = grouped_labels(rule["expr"]) or frozenset().union(*(full_scrape()[one.name] for one in selectors(rule["expr"])))
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert named <= kept | ADDED_LABELS


def test_the_gateways_own_alerts_have_the_same_names() -> None:
    rules = {rule["alert"]: rule["labels"]["severity"] for rule in _rules()}
    own = {rule.name: rule.severity for rule in RULES}
    assert rules.keys() - own.keys() == PROMETHEUS_ALONE
    assert own == {name: rules[name] for name in own}


def test_every_alert_is_set_off_by_a_test_of_its_own() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    expected = " ".join(sample["labels"] for test in tests for each in test["promql_expr_test"] for sample in each["exp_samples"])
    assert set(re.findall(r'alertname="(\w+)"', expected)) == {rule["alert"] for rule in _rules()}


def test_the_dashboard_has_a_row_per_stage_and_no_panel_over_another() -> None:
    panels = _dashboard()["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        *("Service", "Encode", "Prefill", "Decode", "Transfers", "Faults", "Processes and devices")
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_nothing_that_is_measured_is_left_out_of_the_dashboard() -> None:
    """A metric that nobody looks at is one too many."""
    shown = {selector.name for _, expression in EXPRESSIONS for selector in selectors(expression)}
    bases = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in shown}
    measured = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in full_scrape() if name.startswith("epd_")}
    assert measured - bases == {
        *("epd_stage_blocks", "epd_stage_free_blocks", "epd_stage_cached_blocks", "epd_stage_leases"),  # behind the usage ratio
        "epd_stage_steps",  # behind the distribution of step times
        *("epd_emulated_busy_seconds", "epd_emulated_late_seconds"),  # whether emulated devices may be believed
        *("epd_worker_loop_lag_seconds", "epd_worker_host_busy_ratio"),  # likewise
    }
