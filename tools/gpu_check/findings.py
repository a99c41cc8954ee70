"""What a check has found so far: rows, what there is no figure of and why, what broke. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.bench.rows import Row
from tools.gpu_check.tests_of import TestGroup


@dataclass
class Findings:
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # a figure: why there is none
    broken: dict[str, str] = field(default_factory=dict)  # a part: why it did not come to its end
    seconds: dict[str, float] = field(default_factory=dict)  # that a part took
    limits: Mapping[str, float] | None = None
    tests: list[TestGroup] = field(default_factory=list)
    profile: str = ""  # the file, if one was written

    def take(self, event: Mapping[str, Any]) -> None:
        """What a part has found. Other events are for whoever watches it."""
        if "row" in event:
            self.rows.append(event["row"])
        elif "missing" in event:
            self.missing[event["missing"]["name"]] = event["missing"]["reason"]
        elif "limits" in event:
            self.limits = event["limits"]
