"""The table as one picture: a panel for each figure, a group of bars for each workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tools.article.cell import Cell
from tools.article.report import Result, Setting

_PANELS: tuple[tuple[str, Callable[[Cell], float], bool], ...] = (
    ("TTFT, mean (s)", lambda cell: cell.ttft_mean_s, True),
    ("ITL, p99 (ms)", lambda cell: 1e3 * cell.itl_p99_s, True),
    ("requests/s", lambda cell: cell.requests_per_s, True),
    ("sessions at SLO", lambda cell: cell.sessions, False),
)
_COLOURS = ("#9aa0a6", "#5f6368", "#8ab4f8", "#4c8bf5", "#1a56c4", "#0b3d91", "#062a66")


def draw(setting: Setting, results: Sequence[Result], path: Path) -> None:
    """Write an SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(each.cell.workload for each in results))
    names = list(dict.fromkeys(_series(each) for each in sorted(results, key=lambda each: not each.is_baseline)))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5))
    width = 0.8 / len(names)
    for axis, (title, read, is_log) in zip(axes.flat, _PANELS, strict=True):
        for place, name in enumerate(names):
            bars = {each.cell.workload: read(each.cell) for each in results if _series(each) == name}
            where = [workloads.index(workload) + (place - (len(names) - 1) / 2) * width for workload in bars]
            axis.bar(where, list(bars.values()), width, label=name, color=_COLOURS[place % len(_COLOURS)])
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(workloads)), workloads)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        if is_log:
            axis.set_yscale("log")
    figure.suptitle(f"{setting.devices} x {setting.profile.device}, emulated{f' ({setting.mark})' if setting.mark else ''}")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _series(result: Result) -> str:
    """Automatic topologies are one series, whatever they are."""
    return "epd, chosen by epd plan" if result.is_auto else result.cell.topology
