"""Results for programs: one JSON object for all runs with what they were measured with, and one JSON line per request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.loadgen.campaign import Load, Measured
from tools.loadgen.events import Event
from tools.loadgen.knee import KneeSearch
from tools.loadgen.slo import Slo
from tools.loadgen.stats import Summary, e2e_s, itls_s, tpot_s, ttft_s
from tools.loadgen.stream import OK, Record


def summary_json(
    runs: Sequence[Measured],
    *,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    knee: KneeSearch | None = None,
    events: Sequence[Event] = (),
) -> dict[str, Any]:
    """Times in seconds. `provenance`: date, command, machine, versions, server."""
    return {
        **provenance,
        "settings": dict(settings),
        "runs": [
            {
                "label": run.label,
                "started_at": run.run.started_at,
                "load": load_json(run.load),
                "window_s": [run.window.start_s - run.run.start_s, run.window.end_s - run.run.start_s],
                "summary": figures(run.summary),
            }
            for run in runs
        ],
        "knee": None if knee is None else knee_json(knee),
        "events": [asdict(event) for event in events],
    }


def figures(summary: Summary) -> dict[str, Any]:
    """A summary with what follows from it."""
    found = asdict(summary)
    return {
        **found,
        "num_refused": summary.num_refused,
        "num_failed": summary.num_failed,
        "good_share": summary.good_share,
    }


def load_json(load: Load) -> dict[str, Any]:
    return {**asdict(load), "rate": None if load.rate is None else str(load.rate)}


def knee_json(search: KneeSearch) -> dict[str, Any]:
    """What was found and how."""
    return {
        "rate": search.knee,
        "ceiling": search.ceiling,
        "is_bracketed": search.is_bracketed,
        "threshold": search.threshold,
        "probes": [asdict(probe) for probe in search.probes],
    }


def write_requests(path: Path, runs: Sequence[Measured], slo: Slo | None) -> None:
    """Every request of every run, in the order in which they were due."""
    with path.open("w") as file:
        for run in runs:
            for line in request_lines(run, slo):
                file.write(json.dumps(line) + "\n")


def request_lines(measured: Measured, slo: Slo | None) -> Iterator[dict[str, Any]]:
    for record in sorted(measured.run.records, key=lambda record: (record.scheduled_s, record.index, record.turn)):
        line = request_line(record, measured.run.start_s, slo)
        yield {"run": measured.label, "in_window": measured.window.has(record.scheduled_s), **line}


def request_line(record: Record, start_s: float, slo: Slo | None = None) -> dict[str, Any]:
    """One request as a JSON object; times are seconds since `start_s` (the run's start) or durations."""
    line: dict[str, Any] = {
        "index": record.index,
        "turn": record.turn,
        "kind": record.kind,
        "outcome": record.outcome,
        "reason": record.reason,
        "scheduled_s": record.scheduled_s - start_s,
        "sent_s": record.sent_s - start_s,
        "end_s": record.end_s - start_s,
        "http_status": record.http_status,
        "num_images": record.num_images,
        "input_tokens": record.input_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "finish_reason": record.finish_reason,
        "text": record.text,
    }
    if record.detail:
        line["detail"] = record.detail
    if record.spans:
        line["spans"] = list(record.spans)
    if slo is not None:
        line["is_good"] = slo.holds(record)
    if record.outcome == OK:
        line |= {"ttft_s": ttft_s(record), "e2e_s": e2e_s(record), "itl_s": itls_s(record).tolist()}
        if record.output_tokens > 1:
            line["tpot_s"] = tpot_s(record)
    return line
