"""The stages of requests over time, as the server told them: which waited for what, and which ran side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from tools.loadgen.plots import STYLE, as_svg, new_figure
from tools.loadgen.stats import Distribution, distribution
from tools.loadgen.stream import OK, Record

_MAX_REQUESTS = 24
# Drawn as waits, pale; everything else is work.
_WAITS = frozenset({"placement", "encode queue", "prefill queue", "wait for embedding", "decode reserve"})
_COLOURS = {
    "fetch": "#0891b2",
    "tokenize": "#64748b",
    "placement": "#cbd5e1",
    "encode queue": "#fde68a",
    "preprocess": "#f59e0b",
    "encode": "#d97706",
    "embedding transfer": "#84cc16",
    "prefill queue": "#bfdbfe",
    "wait for embedding": "#fecaca",
    "prefill": "#93c5fd",
    "prefill chunk": "#2563eb",
    "decode reserve": "#ddd6fe",
    "transfer": "#a78bfa",
    "decode": "#059669",
}
_OTHER = "#475569"
_LANES = {"http": 0, "gateway": 0, "encode": 1, "prefill": 2, "decode": 3}


def with_timelines(records: Sequence[Record]) -> list[Record]:
    """Successful requests that the server told the stages of."""
    return [record for record in records if record.outcome == OK and record.spans]


@matplotlib.rc_context(STYLE)
def waterfall(records: Sequence[Record]) -> str:
    """Up to two dozen requests, from the fastest to the slowest; in each, a lane per stage with its spans in time."""
    records = sorted(with_timelines(records), key=lambda record: record.end_s - record.scheduled_s)
    if len(records) > _MAX_REQUESTS:
        records = [records[round(place)] for place in np.linspace(0, len(records) - 1, _MAX_REQUESTS)]
    figure = new_figure(10.0, 1.2 + 0.34 * len(records))
    axes = figure.add_subplot()
    seen: dict[str, None] = {}
    for row, record in enumerate(records):
        has_chunks = any(span["name"] == "prefill chunk" for span in record.spans)
        for span in record.spans:
            name = str(span["name"])
            if name == "prefill" and has_chunks:
                continue  # its chunks say more
            seen[name] = None
            lane = _LANES.get(str(span["stage"]), 0)
            start_ms, end_ms = 1e3 * float(span["start_s"]), 1e3 * float(span["end_s"])
            axes.broken_barh(
                [(start_ms, max(end_ms - start_ms, 1e-3))],
                (row + 0.08 + 0.21 * lane, 0.19),
                facecolors=_COLOURS.get(name, _OTHER),
                linewidth=0,
            )
    names = [name for name in _COLOURS if name in seen] + [name for name in seen if name not in _COLOURS]
    for name in names:
        axes.broken_barh([], (0, 0), facecolors=_COLOURS.get(name, _OTHER), label=name)
    axes.set_yticks([row + 0.5 for row in range(len(records))], [f"{record.kind} #{record.index}" for record in records])
    axes.set(xlabel="ms since the request arrived", ylim=(len(records), 0), xlim=(0, None))
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)
    return as_svg(figure, "Stage waterfall")


def stage_times(records: Sequence[Record]) -> list[tuple[str, bool, Distribution]]:
    """Per kind of span: its name, whether it is a wait, and how long requests that had any spent in it, in all its spans.

    Time in which spans of one kind overlap, such as images that are encoded side by side, counts once.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for record in with_timelines(records):
        of_request: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for span in record.spans:
            of_request[str(span["name"])].append(span)
        for name, spans in of_request.items():
            found[name].append(_covered_s([(float(span["start_s"]), float(span["end_s"])) for span in spans]))
    names = [name for name in _COLOURS if name in found] + sorted(name for name in found if name not in _COLOURS)
    return [(name, name in _WAITS, distribution(found[name])) for name in names]


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of stretches."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
