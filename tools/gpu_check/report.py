"""What was found, as one table for people and one JSON for programs. Pure but for the clock and the commit, which it is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tools.bench.rows import meets_bar, render
from tools.gpu_check.findings import Findings


def as_json(
    findings: Findings, gpu: Mapping[str, Any], *, date: str, commit: str, command: str, seconds: float
) -> dict[str, Any]:
    return {
        "tool": "epd tools.gpu_check",
        "date": date,
        "command": command,
        "commit": commit,
        "seconds": round(seconds, 1),
        "device": {name: value for name, value in gpu.items() if name not in ("uuid", "versions")},
        "versions": gpu["versions"],
        "limits": findings.limits,
        "rows": [{**row, "met": meets_bar(row)} for row in findings.rows],
        "missing": findings.missing,
        "broken": findings.broken,
        "part_seconds": {name: round(taken, 1) for name, taken in findings.seconds.items()},
        "tests": [
            {
                "name": group.name,
                "passed": group.passed,
                "failed": group.failed,
                "errors": group.errors,
                "skipped": group.skipped,
                "seconds": round(group.seconds, 1),
                "problem": group.problem,
                "failures": [{"test": test, "message": message} for test, message in group.problems],
            }
            for group in findings.tests
        ],
        "profile": findings.profile,
    }


def as_text(findings: Findings) -> str:
    parts = []
    if findings.rows:
        parts.append(render(findings.rows))
    if findings.missing:
        parts.append("\n".join(["no figure:", *(f"  {name}: {_gist(reason)}" for name, reason in findings.missing.items())]))
    if findings.broken:
        parts.append("\n".join(["broken:", *(f"  {name}: {_last_line(reason)}" for name, reason in findings.broken.items())]))
    if findings.tests:
        lines = ["tests:"]
        for group in findings.tests:
            lines.append(f"  {group.line()}")
            lines += [f"    {test}: {_gist(message)}" for test, message in group.problems]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def verdict(findings: Findings) -> str:
    """One line."""
    short = [row["name"] for row in findings.rows if meets_bar(row) is False]
    met = sum(meets_bar(row) is True for row in findings.rows)
    bad = [group.name for group in findings.tests if not group.is_good]
    words = [f"{len(findings.rows)} figures: {met} meet their bar, {len(short)} fall short of it"]
    words.append(
        f"{sum(group.passed for group in findings.tests)} tests passed" + (f", not good: {', '.join(bad)}" if bad else "")
    )
    if findings.missing or findings.broken:
        words.append(f"{len(findings.missing)} figures missing, {len(findings.broken)} parts broken")
    return "; ".join(words)


def is_good(findings: Findings) -> bool:
    """Whether everything ran and the tests passed. Bars do not count: that a figure falls short is a result."""
    return not findings.broken and all(group.is_good for group in findings.tests)


def slug(gpu: Mapping[str, Any]) -> str:
    """A file name's part, as in "nvidia-h100-80gb-hbm3"."""
    return "-".join(re.findall(r"[a-z0-9]+", str(gpu["name"]).lower()))


def _gist(text: str) -> str:
    """What it begins with and what it comes to."""
    first, _, rest = text.strip().partition("\n")
    return f"{first} ... {_last_line(rest)}" if rest.strip() else first


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
