"""How runs are shown to people at a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tools.loadgen.campaign import Measured
from tools.loadgen.knee import KneeSearch
from tools.loadgen.slo import Slo
from tools.loadgen.stats import Distribution, Summary
from tools.loadgen.stream import OK, UNFINISHED, Record

_BAR = "!" * 78


def table(summary: Summary, slo: Slo | None = None) -> str:
    """The summary as text, one figure per line; times in milliseconds."""
    lines = [
        f"requests      {summary.num_ok} ok, {summary.num_refused} refused (429), {summary.num_failed} failed"
        f" of {summary.num_requests} due in {summary.window_s:.1f} s{', cut short' if summary.was_cut else ''}",
        *(f"  refused     {count} x {reason}" for reason, count in summary.refusals.items()),
        *(f"  failed      {count} x {reason}" for reason, count in summary.failures.items()),
        f"throughput    {summary.requests_per_s:.2f} requests/s of {summary.offered_per_s:.2f} offered, "
        f"{summary.input_tokens_per_s:.1f} input tokens/s, {summary.output_tokens_per_s:.1f} output tokens/s",
        f"tokens        {summary.input_tokens} in ({summary.cached_tokens} cached), {summary.output_tokens} out, "
        f"{summary.num_images} images",
    ]
    if slo is not None:
        share = f"{100 * summary.good_share:.1f} % of the requests within {slo}"
        lines.append(f"goodput       {summary.goodput_per_s:.2f} requests/s; {share}")
    lines += [
        "",
        f"{'ms':<14}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}{'count':>9}",
        _row("TTFT", summary.ttft),
        _row("ITL", summary.itl),
        _row("TPOT", summary.tpot),
        _row("E2E", summary.e2e),
    ]
    if len(summary.by_kind) > 1:
        for kind, latencies in summary.by_kind.items():
            lines += [_row(f"TTFT {kind}", latencies.ttft), _row(f"E2E  {kind}", latencies.e2e)]
    lines += [
        _row("own send lag", summary.send_lag),
        _row("own loop lag", summary.loop_lag),
        f"own CPU       {100 * summary.cpu_share:.0f} % of a core, {summary.cpu_us_per_piece:.1f} us per piece of output",
    ]
    if summary.num_without_usage:
        lines.append(f"note: {summary.num_without_usage} answers had no usage; their tokens are counted by pieces of the stream")
    return "\n".join([*lines, *warning(summary.warnings)])


def warning(reasons: Sequence[str]) -> list[str]:
    """Lines that nobody overlooks, where the load generator itself was the bottleneck."""
    if not reasons:
        return []
    return [
        "",
        _BAR,
        "!! THE LOAD GENERATOR WAS TOO SLOW: these figures are its own, not only the server's.",
        *(f"!!   {reason}" for reason in reasons),
        "!! Give it a core of its own, or a machine, or ask for less.",
        _BAR,
    ]


def comparison(runs: Sequence[Measured]) -> str:
    """Several runs, one per line; times in milliseconds."""
    header = f"{'load':<16}{'offered/s':>10}{'req/s':>9}{'good/s':>9}{'good':>8}{'out tok/s':>11}"
    header += f"{'TTFT p50':>10}{'p99':>10}{'ITL p50':>9}{'p99':>9}{'E2E p50':>10}{'refused':>9}{'failed':>8}"
    lines = [header]
    for run in runs:
        found = run.summary
        times = (found.ttft.p50_s, found.ttft.p99_s, found.itl.p50_s, found.itl.p99_s, found.e2e.p50_s)
        widths = (10, 10, 9, 9, 10)
        lines.append(
            f"{run.label:<16}{found.offered_per_s:>10.2f}{found.requests_per_s:>9.2f}{found.goodput_per_s:>9.2f}"
            f"{100 * found.good_share:>6.1f} %{found.output_tokens_per_s:>11.1f}"
            + "".join(f"{1e3 * time_s:>{width}.1f}" for time_s, width in zip(times, widths, strict=True))
            + f"{found.num_refused:>9}{found.num_failed:>8}"
            + (" late!" if found.warnings else "")
            + (" cut" if found.was_cut else "")
        )
    return "\n".join(lines)


def knee_line(search: KneeSearch) -> str:
    """The search's result in a sentence."""
    wanted = f"{100 * search.threshold:g} % of the requests good"
    if search.knee is None:
        return (
            f"knee: none; not even {search.ceiling:.3g} requests/s kept {wanted}" if search.ceiling else "knee: nothing was tried"
        )
    if search.ceiling is None:
        return f"knee: at or above {search.knee:.3g} requests/s, the highest rate that was tried, with {wanted}"
    return f"knee: {search.knee:.3g} requests/s with {wanted} ({search.ceiling:.3g} no longer; {len(search.probes)} probes)"


def reasons(records: Iterable[Record], limit: int = 3) -> list[str]:
    """The first few failures of each reason, in words."""
    shown: dict[str, list[str]] = {}
    for record in records:
        if record.outcome != OK and record.reason != UNFINISHED and len(shown.setdefault(record.reason, [])) < limit:
            shown[record.reason].append(f"{record.reason}: request {record.index}: {record.detail}")
    return [line for lines in shown.values() for line in lines]


def _row(name: str, values: Distribution) -> str:
    cells = (values.mean_s, values.p50_s, values.p90_s, values.p95_s, values.p99_s, values.max_s)
    return f"{name:<14}" + "".join(f"{1e3 * cell:>10.2f}" for cell in cells) + f"{values.count:>9}"
