"""A scrape with everything in it that a gateway can show, and what expressions over it ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from prometheus_client.parser import text_string_to_metric_families

from epd.distribution import STAGE_FIGURES, Spreads
from epd.exposition import MemberLoad
from epd.metrics import GatewayMetrics
from protocol.messages import LinkLoad, ProcessLoad, StageLoad, WorkerId

ADDED_LABELS = frozenset({"instance", "job"})  # by Prometheus itself
_SELECTOR = re.compile(r"\b(epd_\w+|process_\w+|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric in an expression, with its matchers (label, operator, value)."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


@cache
def full_scrape() -> Mapping[str, frozenset[str]]:
    """Label names by sample name, of a cluster in which everything has happened."""
    metrics = GatewayMetrics()
    found: dict[str, frozenset[str]] = {"up": frozenset()}
    for family in text_string_to_metric_families(
        metrics.render([_member(role) for role in ("encode", "prefill", "decode")]).decode()
    ):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, frozenset()) | frozenset(sample.labels)
    return found


def selectors(expression: str) -> Iterator[Selector]:
    for name, inside in _SELECTOR.findall(_GROUPING.sub("", expression)):
        yield Selector(name, tuple(_MATCHER.findall(inside)))


def grouped_labels(expression: str) -> set[str]:
    """What an expression groups or joins by."""
    return {label.strip() for inside in _GROUPING.findall(expression) for label in inside.split(",") if label.strip()}


def _member(role: str) -> MemberLoad:
    spreads = Spreads()
    for figure in STAGE_FIGURES:
        spreads.observe(figure, 0.1, "mapped" if figure == "transfer_seconds" else "")
    stage = StageLoad(role, spreads=spreads.parts())
    process = ProcessLoad(1.0, 1, "a device", 0.5, 1, 2, 3.0, 1.0, 0.0, 0.001, 0.5)
    return MemberLoad(WorkerId(f"{role}-0"), (stage,), (LinkLoad(WorkerId("p"), "mapped"),), process)
