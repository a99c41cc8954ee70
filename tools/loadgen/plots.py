"""The report's pictures, drawn by matplotlib as SVG without a display. Numbers in, SVG text out.

matplotlib is an extra (`report`): it is imported here only, and this module only when a report is asked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.loadgen.campaign import Measured
from tools.loadgen.events import Event
from tools.loadgen.slo import Slo
from tools.loadgen.stats import Distribution, FloatArray, e2e_s, itls_s, tpot_s, ttft_s
from tools.loadgen.stream import OK, Record

_MAX_CURVES = 10
_CDF_POINTS = 300
_LEAST_MS = 0.05  # shown on a logarithmic axis
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#9333ea", "#475569")
_MARK = "#b45309"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@matplotlib.rc_context(STYLE)
def latency_cdfs(runs: Sequence[Measured], slo: Slo | None) -> str:
    """TTFT, ITL, TPOT and E2E: the share of requests (of gaps) that took at most so long. One curve per run."""
    figure = new_figure(10.0, 6.2)
    bounds = slo or Slo()
    panels = (("TTFT", bounds.ttft), ("ITL", bounds.itl), ("TPOT", bounds.tpot), ("E2E", bounds.e2e))
    shown = _thinned(runs)
    for place, (name, bound) in enumerate(panels):
        axes = figure.add_subplot(2, 2, place + 1)
        for colour, run in zip(_COLOURS, shown, strict=False):
            values = _values(run, name)
            if len(values):
                shares = np.linspace(0, 1, min(_CDF_POINTS, len(values)) if len(values) > 1 else 2)
                axes.plot(1e3 * np.quantile(values, shares), 100 * shares, color=colour, label=run.label, linewidth=1.5)
        if bound is not None:
            axes.axvline(1e3 * bound, color=_MARK, linestyle="--", linewidth=1, label=f"SLO {1e3 * bound:g} ms")
        axes.set(xlabel=f"{name}, ms", ylabel="% at most", ylim=(0, 101))
        if _is_wide(shown, name):
            axes.set_xscale("log")
            axes.set_xlim(left=max(_LEAST_MS, axes.get_xlim()[0]))  # tokens that were sent together have no gap at all
        if place == 0 and (len(shown) > 1 or bound is not None):
            axes.legend(loc="lower right")
    return as_svg(figure, "Latency CDFs")


@matplotlib.rc_context(STYLE)
def throughput_against_latency(runs: Sequence[Measured], slo: Slo | None) -> str:
    """What the server gave at each load, and what its users saw: output tokens/s and requests/s against latency, and goodput."""
    figure = new_figure(10.0, 3.6)
    runs = sorted(runs, key=lambda run: run.summary.offered_per_s)
    found = [run.summary for run in runs]
    bounds = slo or Slo()
    for place, (name, bound) in enumerate((("ttft", bounds.ttft), ("itl", bounds.itl))):
        axes = figure.add_subplot(1, 3, place + 1)
        latencies: list[Distribution] = [getattr(summary, name) for summary in found]
        throughput = [summary.output_tokens_per_s for summary in found]
        axes.plot(throughput, [1e3 * each.p50_s for each in latencies], "o-", color=_COLOURS[0], label="p50")
        axes.plot(throughput, [1e3 * each.p99_s for each in latencies], "s--", color=_COLOURS[1], label="p99")
        for run, each, tokens_per_s in zip(runs, latencies, throughput, strict=True):
            axes.annotate(run.label, (tokens_per_s, 1e3 * each.p50_s), textcoords="offset points", xytext=(3, 4), fontsize=7)
        if bound is not None:
            axes.axhline(1e3 * bound, color=_MARK, linestyle="--", linewidth=1)
        axes.set(xlabel="output tokens/s", ylabel=f"{name.upper()}, ms", yscale="log" if _spans_decades(latencies) else "linear")
        axes.legend()
    axes = figure.add_subplot(1, 3, 3)
    offered = [summary.offered_per_s for summary in found]
    axes.plot(offered, offered, ":", color="#94a3b8", label="offered")
    axes.plot(offered, [summary.requests_per_s for summary in found], "o-", color=_COLOURS[0], label="answered")
    axes.plot(offered, [summary.goodput_per_s for summary in found], "s-", color=_COLOURS[2], label="good")
    axes.set(xlabel="offered requests/s", ylabel="requests/s")
    axes.legend()
    return as_svg(figure, "Throughput against latency")


@matplotlib.rc_context(STYLE)
def timeline(measured: Measured, events: Sequence[Event] = ()) -> str:
    """One run over time: requests in flight, output tokens/s, and ends that were no success; marks where something happened."""
    run, records = measured.run, measured.run.records
    figure = new_figure(10.0, 5.0)
    flight, tokens, errors = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 3, 1.4)})
    length_s = max(run.wall_s, 1e-3)
    step_s = _bin_s(length_s)
    edges = np.arange(0, length_s + step_s, step_s)
    begins = np.sort([record.sent_s - run.start_s for record in records])
    ends = np.sort([record.end_s - run.start_s for record in records])
    at = np.linspace(0, length_s, 500)
    in_flight = np.searchsorted(begins, at, "right") - np.searchsorted(ends, at, "right")
    flight.fill_between(at, in_flight, step="post", color=_COLOURS[0], alpha=0.35, linewidth=0)
    flight.set(ylabel="in flight", ylim=(0, None))
    _rate(tokens, np.concatenate([_times(record) - run.start_s for record in records] or [np.empty(0)]), edges, _COLOURS[2])
    tokens.set(ylabel="output pieces/s", ylim=(0, None))
    bad = np.asarray([record.end_s - run.start_s for record in records if record.outcome != OK])
    counts, _, _ = errors.hist(bad, bins=edges, color=_COLOURS[1])
    errors.set(ylabel="refused\nor failed", xlabel="s", xlim=(0, length_s), ylim=(0, max(1.0, 1.1 * float(np.max(counts)))))
    start_s, end_s = measured.window.start_s - run.start_s, measured.window.end_s - run.start_s
    for axes in (flight, tokens, errors):
        axes.axvspan(start_s, end_s, color="#94a3b8", alpha=0.10, linewidth=0)
        for event in events_within(events, measured):
            axes.axvline(event.at - run.started_at, color=_MARK, linewidth=1, linestyle="--")
    for event in events_within(events, measured):
        words = f"{event.kind}: {event.text}" if event.text != event.kind else event.kind
        place = (event.at - run.started_at, flight.get_ylim()[1])
        flight.annotate(words[:60], place, rotation=20, fontsize=7, color=_MARK, annotation_clip=False)
    return as_svg(figure, "Timeline")


def events_within(events: Sequence[Event], measured: Measured) -> list[Event]:
    """Those that happened during the run."""
    began = measured.run.started_at
    return [event for event in events if began <= event.at <= began + measured.run.wall_s]


def _values(run: Measured, name: str) -> FloatArray:
    done = [record for record in run.run.records if record.outcome == OK and run.window.has(record.scheduled_s)]
    match name:
        case "TTFT":
            return np.asarray([ttft_s(record) for record in done])
        case "ITL":
            return np.concatenate([itls_s(record) for record in done] or [np.empty(0)])
        case "TPOT":
            return np.asarray([tpot_s(record) for record in done if record.output_tokens > 1])
        case _:
            return np.asarray([e2e_s(record) for record in done])


def _times(record: Record) -> FloatArray:
    return np.asarray(record.piece_times_s, dtype=np.float64)


def _rate(axes: Axes, times: FloatArray, edges: FloatArray, colour: str) -> None:
    counts, _ = np.histogram(times, bins=edges)
    axes.stairs(counts / np.diff(edges), edges, color=colour, fill=True, alpha=0.35)


def _bin_s(length_s: float) -> float:
    """A round step that cuts the run into 60 to 150."""
    power = 10.0 ** np.floor(np.log10(length_s / 60))
    return float(next(step * power for step in (1, 2, 5, 10) if length_s / (step * power) <= 150))


def _thinned(runs: Sequence[Measured]) -> list[Measured]:
    if len(runs) <= _MAX_CURVES:
        return list(runs)
    return [runs[round(place)] for place in np.linspace(0, len(runs) - 1, _MAX_CURVES)]


def _is_wide(runs: Sequence[Measured], name: str) -> bool:
    values = np.concatenate([_values(run, name) for run in runs] or [np.empty(0)])
    values = values[values > 0]
    return bool(len(values)) and float(np.quantile(values, 0.99)) > 20 * float(np.quantile(values, 0.1))


def _spans_decades(latencies: Sequence[Distribution]) -> bool:
    values = [each.p50_s for each in latencies if each.p50_s > 0]
    return bool(values) and max(each.p99_s for each in latencies) > 30 * min(values)


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Figure, title: str) -> str:
    """The picture as an element that can stand in a page; `title` is read out to whoever cannot see it."""
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', svg, count=1)
