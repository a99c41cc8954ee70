"""The article's table out of cells: Markdown for people and READMEs, JSON to keep. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from epd.emulated.profile import Profile
from epd.sizing.render import provenance
from tools.article.cell import Cell

_HEADER = ("workload", "topology", "TTFT mean / p50 / p99", "ITL p99", "req/s", "utilisation", "sessions at SLO")
_RATIOS = ("workload", "epd", "against", "TTFT", "req/s", "utilisation", "sessions", "ITL p99")
ARTICLE = ("the article", "E, P, D apart", "one colocated service", "3.1x", "2.3x", "65 -> 89 %", "2.7x", "-")


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells have in common."""

    profile: Profile
    devices: int
    slow: float
    promise: str
    output_tokens: int
    command: str

    @property
    def mark(self) -> str:
        """To be read with every figure."""
        return "" if self.profile.provenance == "measured" else "roofline, not measured"


@dataclass(frozen=True, slots=True)
class Result:
    """One topology under one workload. `is_auto`: the split that `epd plan` chose for it."""

    cell: Cell
    sessions: int
    is_baseline: bool
    is_auto: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell.topology} (auto)" if self.is_auto else self.cell.topology


def markdown(setting: Setting, results: Sequence[Result]) -> str:
    """Both tables, what was run, and every reason to doubt it."""
    parts = [
        f"Emulated devices: {provenance(setting.profile)}.",
        f"{setting.devices} devices for every topology; users ask again when answered, {setting.output_tokens} tokens an answer;"
        f" times are devices' (slowed down {setting.slow:g} times for the host, divided back). SLO: {setting.promise}.",
        f"Run: `{setting.command}`.",
        table(setting, results),
        ratio_table(setting, results),
    ]
    if found := doubts(results):
        parts.append("**Not to be trusted**: this host was too slow.\n\n" + "\n".join(f"- {doubt}" for doubt in found))
    return "\n\n".join(parts)


def table(setting: Setting, results: Sequence[Result]) -> str:
    """In bold: the best of a workload."""
    rows = []
    for workload, group in _by_workload(results).items():
        best = {
            "ttft": min(each.cell.ttft_mean_s for each in group),
            "itl": min(each.cell.itl_p99_s for each in group),
            "rate": max(each.cell.requests_per_s for each in group),
            "sessions": max(each.cell.sessions for each in group),
        }
        for place, result in enumerate(group):
            cell = result.cell
            ttft = f"{seconds(cell.ttft_mean_s)} / {seconds(cell.ttft_p50_s)} / {seconds(cell.ttft_p99_s)}"
            rows.append(
                (
                    f"{workload}, {result.sessions} users" if place == 0 else "",
                    result.name + (" *" if cell.doubts else ""),
                    _bold(ttft, cell.ttft_mean_s == best["ttft"]),
                    _bold(seconds(cell.itl_p99_s), cell.itl_p99_s == best["itl"]),
                    _bold(f"{cell.requests_per_s:.1f}", cell.requests_per_s == best["rate"]),
                    f"{100 * min(1.0, cell.utilisation):.0f} %",
                    _bold(_sessions(cell), cell.sessions == best["sessions"]),
                )
            )
    header = (f"workload ({setting.mark})" if setting.mark else "workload", *_HEADER[1:])
    return _markdown(header, rows)


def ratio_table(setting: Setting, results: Sequence[Result]) -> str:
    """What the automatic topology gains over each baseline; above 1 is better for epd."""
    rows = [ARTICLE]
    for workload, group in _by_workload(results).items():
        chosen = next((each for each in group if each.is_auto), None)
        if chosen is None:
            continue
        for base in group:
            if base.is_baseline:
                old, new = base.cell, chosen.cell
                rows.append(
                    (
                        workload,
                        new.topology,
                        old.topology,
                        ratio(old.ttft_mean_s, new.ttft_mean_s),
                        ratio(new.requests_per_s, old.requests_per_s),
                        f"{100 * min(1.0, old.utilisation):.0f} -> {100 * min(1.0, new.utilisation):.0f} %",
                        ratio(new.sessions, old.sessions, at_least=new.is_open, at_most=old.is_open),
                        ratio(old.itl_p99_s, new.itl_p99_s),
                    )
                )
    header = (f"workload ({setting.mark})" if setting.mark else "workload", *_RATIOS[1:])
    return _markdown(header, rows)


def as_json(setting: Setting, results: Sequence[Result], *, machine: dict[str, Any], date: str) -> dict[str, Any]:
    profile = setting.profile
    return {
        "date": date,
        "machine": machine,
        "command": setting.command,
        "profile": {"device": profile.device, "model": profile.model.name, "provenance": profile.provenance},
        "profile_source": profile.source,
        "devices": setting.devices,
        "slow": setting.slow,
        "promise": setting.promise,
        "output_tokens": setting.output_tokens,
        "is_trusted": not doubts(results),
        "cells": [
            {
                **_finite(asdict(each.cell)),
                "users": each.sessions,
                "is_baseline": each.is_baseline,
                "is_auto": each.is_auto,
            }
            for each in results
        ],
    }


def doubts(results: Sequence[Result]) -> list[str]:
    found = [f"{each.cell.workload}, {each.cell.topology}: {doubt}" for each in results for doubt in each.cell.doubts]
    broken = [each.cell for each in results if each.cell.failures]
    return found + [f"{cell.workload}, {cell.topology}: {cell.failures} requests failed" for cell in broken]


def ratio(better: float, worse: float, *, at_least: bool = False, at_most: bool = False) -> str:
    """better / worse; either may only be known to be no less than it is."""
    if at_least and at_most:
        return "both open"
    if not worse or math.isnan(worse) or math.isnan(better):
        return "-" if not better or math.isnan(better) else "from 0"
    sign = ">= " if at_least else "<= " if at_most else ""
    return f"{sign}{better / worse:.2f}x"


def seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def _sessions(cell: Cell) -> str:
    return f"{'>= ' if cell.is_open else ''}{cell.sessions:.0f}"


def _by_workload(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.cell.workload, []).append(result)
    return {name: sorted(group, key=lambda each: not each.is_baseline) for name, group in found.items()}


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
