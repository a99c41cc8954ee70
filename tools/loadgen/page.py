"""The report: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tools.loadgen import plots, terminal
from tools.loadgen.campaign import Measured
from tools.loadgen.events import Event
from tools.loadgen.knee import KneeSearch
from tools.loadgen.slo import Slo
from tools.loadgen.stats import Distribution
from tools.loadgen.waterfall import stage_times, waterfall, with_timelines

_MAX_TIMELINES = 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 68rem; padding: 1rem; }}
h1 {{ font-size: 1.5rem; margin: .2rem 0; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p.note {{ opacity: .75; margin: .3rem 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: .5rem 0; padding: .5rem; background: #fff; border-radius: 6px; overflow-x: auto; }}
figure svg {{ width: 100%; min-width: 40rem; height: auto; display: block; }}
.warning {{ background: #b91c1c; color: #fff; padding: .7rem 1rem; border-radius: 6px; }}
pre {{ overflow-x: auto; font-size: 12px; }}
</style></head><body>
{body}
</body></html>
"""


def report(
    runs: Sequence[Measured],
    *,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    slo: Slo | None = None,
    knee: KneeSearch | None = None,
    events: Sequence[Event] = (),
) -> str:
    """The page for one or more runs."""
    title = f"Load on {settings.get('model') or 'a server'}: " + (runs[0].label if len(runs) == 1 else f"{len(runs)} runs")
    machine = provenance.get("machine", {})
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="note">{_text(provenance.get("date", ""))} · {_text(settings.get("url", ""))} · load from '
        f"{_text(machine.get('cpu', '?'))}, {_text(machine.get('cores', '?'))} cores</p>",
        *_warnings(runs),
        *([f"<p><strong>{_text(terminal.knee_line(knee))}</strong></p>"] if knee is not None else []),
        "<h2>Figures</h2>",
        _figures(runs, slo),
    ]
    if len(runs) > 1:
        parts += ["<h2>Throughput against latency</h2>", _picture(plots.throughput_against_latency(runs, slo))]
    parts += ["<h2>Latency</h2>", _latencies(runs), _picture(plots.latency_cdfs(runs, slo))]
    parts += _timelines(runs, events)
    parts += _stages(runs)
    parts += [
        "<h2>How it was measured</h2>",
        f"<pre>{_text(json.dumps({**provenance, 'settings': settings}, indent=2, default=str))}</pre>",
    ]
    return _PAGE.format(title=_text(title), body="\n".join(parts))


def _warnings(runs: Sequence[Measured]) -> list[str]:
    return [
        f'<p class="warning"><strong>{_text(run.label)}: the load generator was too slow</strong>, so these figures are its own, '
        f"not only the server's: {_text('; '.join(run.summary.warnings))}.</p>"
        for run in runs
        if run.summary.warnings
    ]


def _figures(runs: Sequence[Measured], slo: Slo | None) -> str:
    head = ("load", "due", "ok", "refused", "failed", "offered/s", "req/s", "good/s", "good")
    rows = []
    for run in runs:
        found = run.summary
        rates = (found.offered_per_s, found.requests_per_s, found.goodput_per_s)
        rows.append(
            (
                run.label + (" (cut short)" if found.was_cut else ""),
                *(found.num_requests, found.num_ok, found.num_refused, found.num_failed),
                *(f"{rate:.2f}" for rate in rates),
                f"{100 * found.good_share:.1f} %",
                *(f"{found.input_tokens_per_s:.0f}", f"{found.output_tokens_per_s:.0f}", found.cached_tokens, found.num_images),
            )
        )
    table = _table([*head, "input tok/s", "output tok/s", "cached tokens", "images"], rows)
    reasons = [
        f"<li>{_text(run.label)}: {count} x {word} {_text(reason)}</li>"
        for run in runs
        for word, counts in (("refused", run.summary.refusals), ("failed", run.summary.failures))
        for reason, count in counts.items()
    ]
    promise = f'<p class="note">Good: within {_text(slo)} (seconds).</p>' if slo else ""
    return table + promise + (f"<ul>{''.join(reasons)}</ul>" if reasons else "")


def _latencies(runs: Sequence[Measured]) -> str:
    rows: list[list[object]] = []
    for run in runs:
        found = run.summary
        named = [("TTFT", found.ttft), ("ITL", found.itl), ("TPOT", found.tpot), ("E2E", found.e2e)]
        if len(found.by_kind) > 1:
            named += [(f"TTFT of {kind}", latencies.ttft) for kind, latencies in found.by_kind.items()]
            named += [(f"E2E of {kind}", latencies.e2e) for kind, latencies in found.by_kind.items()]
        named += [("own send lag", found.send_lag), ("own loop lag", found.loop_lag)]
        rows += [[f"{run.label}: {name}" if len(runs) > 1 else name, *_cells(values)] for name, values in named]
    return _table(["ms", "mean", "p50", "p90", "p95", "p99", "max", "count"], rows)


def _timelines(runs: Sequence[Measured], events: Sequence[Event]) -> list[str]:
    parts = ["<h2>Timeline</h2>", '<p class="note">Shaded: the window that counts. Dashed: events.</p>']
    for run in runs[:_MAX_TIMELINES]:
        parts += [f"<h3>{_text(run.label)}</h3>"] if len(runs) > 1 else []
        parts.append(_picture(plots.timeline(run, events)))
        during = plots.events_within(events, run)
        rows = [[f"{event.at - run.run.started_at:.1f} s", event.kind, event.text] for event in during]
        parts += [_table(["at", "what", ""], rows)] if rows else []
    if len(runs) > _MAX_TIMELINES:
        parts.append(f'<p class="note">The other {len(runs) - _MAX_TIMELINES} runs are in the JSON lines.</p>')
    return parts


def _stages(runs: Sequence[Measured]) -> list[str]:
    """Of the run with the most timelines that is not overloaded beyond use: the last one whose requests are mostly good."""
    told = [run for run in runs if with_timelines(run.run.records)]
    if not told:
        return ["<h2>Stages</h2>", '<p class="note">The server told nothing of its stages.</p>']
    run = next((run for run in reversed(told) if run.summary.good_share >= 0.5), told[-1])
    records = [record for record in run.run.records if run.window.has(record.scheduled_s)] or run.run.records
    rows = [[f"{name}{' (waiting)' if is_wait else ''}", *_cells(values)] for name, is_wait, values in stage_times(records)]
    return [
        f"<h2>Stages of requests ({_text(run.label)})</h2>",
        '<p class="note">As the server told them, from the fastest request to the slowest. Lanes of a request from above: the '
        "endpoint, encode, prefill, decode. Stages work side by side, so their times add up to more than the whole: a transfer "
        "is open from when decode has room until it has all of the KV, most of which comes while prefill still computes.</p>",
        _picture(waterfall(records)),
        _table(["ms per request", "mean", "p50", "p90", "p95", "p99", "max", "requests"], rows),
    ]


def _cells(values: Distribution) -> list[object]:
    times = (values.mean_s, values.p50_s, values.p90_s, values.p95_s, values.p99_s, values.max_s)
    return [*(f"{1e3 * time_s:.2f}" for time_s in times), values.count]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _text(value: object) -> str:
    return html.escape(str(value))
