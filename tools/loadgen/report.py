"""How a run is shown: a table for people, JSON for programs, one line per request for whoever wants to look closer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tools.loadgen.stats import Distribution, Summary, e2e_s, itls_s, tpot_s, ttft_s
from tools.loadgen.stream import OK, Record


def table(summary: Summary) -> str:
    """The summary as text, one figure per line; times in milliseconds."""
    lines = [
        f"requests      {summary.num_ok} ok, {summary.num_refused} refused (429), {summary.num_failed} failed"
        f" of {summary.num_requests} in {summary.wall_s:.1f} s",
        *(f"  failed      {count} x {reason}" for reason, count in summary.failures.items()),
        f"throughput    {summary.requests_per_s:.2f} requests/s, {summary.input_tokens_per_s:.1f} input tokens/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s",
        f"tokens        {summary.input_tokens} in ({summary.cached_tokens} cached), {summary.output_tokens} out, "
        f"{summary.num_images} images",
        "",
        f"{'ms':<10}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}{'count':>9}",
        _row("TTFT", summary.ttft),
        _row("ITL", summary.itl),
        _row("TPOT", summary.tpot),
        _row("E2E", summary.e2e),
        _row("send lag", summary.send_lag),
        _row("loop lag", summary.loop_lag),
    ]
    if summary.num_without_usage:
        lines.append(f"note: {summary.num_without_usage} answers had no usage; their tokens are counted by pieces of the stream")
    if summary.send_lag.p99_s > 0.05 or summary.loop_lag.p99_s > 0.05:
        lines.append("note: the load generator itself ran late (lags above); its machine is too busy for this load")
    return "\n".join(lines)


def as_json(summary: Summary, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with what it was measured with; times in seconds."""
    return {"settings": dict(settings), **asdict(summary), "num_failed": summary.num_failed}


def request_line(record: Record, start_s: float) -> dict[str, Any]:
    """One request as a JSON object; times are seconds since `start_s` (the run's start) or durations."""
    line: dict[str, Any] = {
        "index": record.index,
        "outcome": record.outcome,
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
    if record.outcome == OK:
        line |= {"ttft_s": ttft_s(record), "e2e_s": e2e_s(record), "itl_s": itls_s(record)}
        if record.output_tokens > 1:
            line["tpot_s"] = tpot_s(record)
    return line


def reasons(records: Iterable[Record], limit: int = 3) -> list[str]:
    """The first few failures of each reason, in words."""
    shown: dict[str, list[str]] = {}
    for record in records:
        if record.outcome != OK and len(shown.setdefault(record.outcome, [])) < limit:
            shown[record.outcome].append(f"{record.outcome}: request {record.index}: {record.detail}")
    return [line for lines in shown.values() for line in lines]


def _row(name: str, values: Distribution) -> str:
    cells = (values.mean_s, values.p50_s, values.p90_s, values.p95_s, values.p99_s, values.max_s)
    return f"{name:<10}" + "".join(f"{1e3 * cell:>10.2f}" for cell in cells) + f"{values.count:>9}"
