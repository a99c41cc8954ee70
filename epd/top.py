"""`epd top`: the live view in a terminal, from the same figures as the dashboard.

Knows: /v1/cluster/live. Draws whole frames with rich; what is too much for the window is cut off below, so the important comes
first.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from epd.config import TopConfig
from epd.errors import BadConfig, EpdError, Unavailable

MAX_MOMENTS = 60
MAX_EVENTS = 8
MAX_REQUESTS = 10
FETCH_TIMEOUT_S = 5.0
_ROLES = ("encode", "prefill", "decode")
_COLOURS = {"gateway": "bright_black", "http": "bright_black", "encode": "blue", "prefill": "yellow", "decode": "green"}
_SEVERITIES = {"good": "green", "info": "", "warning": "yellow", "bad": "bold red"}
_LATENCIES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
_CURVES = ("ttft_p99", "itl_p99", "num_good", "num_tokens", "num_failed", "num_refused")
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Seen:
    """What has been fetched so far. `take` brings in what is new."""

    live: dict[str, Any] = field(default_factory=dict)
    moments: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def query(self) -> str:
        number = self.moments[-1]["number"] if self.moments else -1
        return f"after_moment={number}&after_revision={self.live.get('revision', 0)}"

    def take(self, live: dict[str, Any]) -> bool:
        """False: the gateway has started again, and all of it is to be asked for anew."""
        if self.live and live["uptime_s"] < self.live["uptime_s"]:
            self.live, self.moments, self.requests, self.events = {}, [], [], []
            return False
        self.live = live
        self.moments = [*self.moments, *live["moments"]][-MAX_MOMENTS:]
        self.requests = [*self.requests, *live["requests"]][-MAX_REQUESTS:]
        changed = {(event["at"], event["kind"], event["text"]) for event in live["events"]}
        kept = [event for event in self.events if (event["at"], event["kind"], event["text"]) not in changed]
        self.events = sorted([*kept, *live["events"]], key=lambda event: float(event["at"]))[-MAX_EVENTS:]
        return True


def run(config: TopConfig, console: Console | None = None) -> int:
    """Draw until interrupted, or once. Returns the exit status.

    Raises:
        EpdError: with `once`, the gateway cannot be asked; otherwise that is shown, and it is asked again.
    """
    console = console or Console()
    seen = Seen()
    if config.once:
        seen.take(_fetch(config, seen))
        console.print(frame(seen))
        return 0
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as screen:
            while True:
                screen.update(_next(config, seen), refresh=True)
                time.sleep(config.interval_s)
    except KeyboardInterrupt:
        return 0


def _next(config: TopConfig, seen: Seen) -> RenderableType:
    try:
        if not seen.take(_fetch(config, seen)):
            seen.take(_fetch(config, seen))
    except EpdError as error:
        notice = Text(f"{error.message}; asking again", style="bold red")
        return Group(notice, frame(seen)) if seen.live else notice
    return frame(seen)


def _fetch(config: TopConfig, seen: Seen) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    request = urllib.request.Request(f"{config.url}/v1/cluster/live?{seen.query()}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise BadConfig(f"{config.url} asks for a key: give it with --api-key or EPD_API_KEY") from error
        raise Unavailable(f"{config.url} answered {error.code}: is an epd gateway there?") from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"{config.url} does not answer ({error})") from error


# --- a frame --------------------------------------------------------------------------------------------------------


def frame(seen: Seen) -> RenderableType:
    """Everything, from the most important to the least."""
    live = seen.live
    parts: list[RenderableType] = [_headline(live)]
    for alert in live["alerts"]:
        style = "bold red" if alert["severity"] == "critical" else "yellow"
        parts.append(Text(f"! {alert['name']}: {alert['text']}", style=style))
    parts += [_figures(seen), _workers(seen), _requests(seen), _links(seen), _events(seen)]
    return Group(*parts)


def _headline(live: dict[str, Any]) -> Text:
    state = ("ready", "green") if live["is_ready"] else (live["reason"], "bold red")
    return Text.assemble(
        ("epd ", "bold"), f"{live['model']}, up {_since(live['uptime_s'])}  ", state, f"  {live['num_running']} running"
    )


def _figures(seen: Seen) -> Table:
    """The last minute in numbers, and the last two as curves."""
    moments, seconds = seen.moments[-30:], max(1, len(seen.moments[-30:])) * seen.live["moment_s"]

    def rate(name: str) -> float:
        return sum(float(moment[name]) for moment in moments) / float(seconds)

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("TTFT p50/p99", "ITL p50/p99", "goodput", "output", "failed", "refused"):
        table.add_column(name)
    slow = {name: [moment[name] for moment in moments if moment[name] is not None] for name in _LATENCIES}
    table.add_row(
        *(
            f"{_seconds(_middle(slow[f'{what}_p50']))} / {_seconds(max(slow[f'{what}_p99'], default=None))}"
            for what in ("ttft", "itl")
        ),
        f"{rate('num_good'):.2f}/s of {rate('num_judged'):.2f}/s",
        f"{rate('num_tokens'):.1f} tokens/s",
        str(sum(moment["num_failed"] for moment in moments)),
        str(sum(moment["num_refused"] for moment in moments)),
    )
    table.add_row(*(_curve([moment[name] for moment in seen.moments]) for name in _CURVES))
    return table


def _workers(seen: Seen) -> Table | Text:
    live = seen.live
    if not live["workers"]:
        return Text("no worker has joined", style="yellow")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "stage", "run", "wait", "busy", "blocks", "cache hits", "evicted", "memory", "device", "state"):
        table.add_column(name, justify="right" if name in ("run", "wait", "evicted", "memory") else "left")
    last = seen.moments[-1]["stages"] if seen.moments else {}
    for worker in live["workers"]:
        for stage in worker["stages"]:
            point = last.get(f"{worker['worker']}/{stage['role']}")
            held = 1 - stage["num_free_blocks"] / stage["num_blocks"] if stage["num_blocks"] else 0.0
            hits = f"{stage['cache_hits'] / stage['cache_queries']:.0%}" if stage["cache_queries"] else "-"
            process = worker["process"]
            table.add_row(
                worker["worker"],
                Text(stage["role"], style=_COLOURS[stage["role"]]),
                str(stage["num_running"]),
                str(stage["num_waiting"]),
                _meter(point[3] if point else 0.0),
                _meter(held),
                hits,
                str(stage["num_evictions"]),
                _bytes(process["rss_bytes"]) if process else "-",
                _device(worker),
                _state(worker),
            )
    return table


def _device(worker: dict[str, Any]) -> str:
    process = worker["process"]
    if not process or process["utilisation"] < 0:
        return str(worker["device"])
    return f"{worker['device']} {process['utilisation']:.0%}, {_bytes(process['memory_used_bytes'])}"


def _state(worker: dict[str, Any]) -> Text:
    if worker["is_draining"]:
        return Text("draining", style="yellow")
    silent = worker["reported_s_ago"]
    return Text(f"silent for {_since(silent)}", style="red") if silent > 2 else Text("")


def _links(seen: Seen) -> Table | Text:
    last = seen.moments[-1]["links"] if seen.moments else {}
    rows = [(worker["worker"], link) for worker in seen.live["workers"] for link in worker["links"] if link["num_transfers"]]
    if not rows:
        return Text("nothing has moved between workers", style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("link", "rung", "now", "in all"):
        table.add_column(name, justify="left" if name in ("link", "rung") else "right")
    rows.sort(key=lambda row: -last.get(f"{row[0]}<{row[1]['peer']}", 0.0))
    for worker, link in rows[:6]:
        rate = last.get(f"{worker}<{link['peer']}", 0.0)
        table.add_row(f"{link['peer']} > {worker}", link["rung"], f"{_bytes(rate)}/s", _bytes(link["num_bytes"]))
    return table


def _requests(seen: Seen) -> Table | Text:
    running = [{**request, "outcome": "runs"} for request in reversed(seen.live["running"])]
    shown = [*running[:5], *reversed(seen.requests)][:MAX_REQUESTS]
    if not shown:
        return Text("no request has come yet", style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("request", "in", "images", "out", "TTFT", "all", "where its time went"):
        table.add_column(name, justify="right" if name in ("in", "images", "out", "TTFT", "all") else "left")
    for request in shown:
        end = request["e2e_s"] if request["e2e_s"] is not None else request["age_s"]
        missed = request["outcome"] == "ok" and not request["is_good"]
        style = "red" if request["outcome"] not in ("ok", "runs", "cancelled") else "yellow" if missed else ""
        table.add_row(
            Text(f"{request['outcome']}{', missed its SLO' if missed else ''}", style=style),
            str(request["num_prompt_tokens"]),
            str(request["num_images"]),
            str(request["num_tokens"]),
            _seconds(request["ttft_s"]),
            _seconds(end),
            _waterfall(request["spans"], end),
        )
    return table


def _waterfall(spans: Sequence[Sequence[Any]], end: float, width: int = 40) -> Text:
    """One character per fortieth of the time, in the colour of the stage that is furthest along then."""
    drawn = Text()
    for place in range(width):
        at = (place + 0.5) / width * end
        stages = {stage for _, stage, _, start, stop in spans if start <= at < stop}
        stage = next((role for role in reversed(_ROLES) if role in stages), "gateway" if stages else "")
        drawn.append("█" if stage else "·", style=_COLOURS.get(stage, "dim"))
    return drawn


def _events(seen: Seen) -> Text:
    drawn = Text()
    for event in reversed(seen.events):
        ago = _since(seen.live["now"] - event["at"])
        times = f" ({event['count']} times)" if event["count"] > 1 else ""
        drawn.append(f"{ago:>7} ago  ", style="dim")
        drawn.append(f"{event['worker']} {event['text']}{times}\n".lstrip(), style=_SEVERITIES[event["severity"]])
    return drawn


# --- words ----------------------------------------------------------------------------------------------------------


def _curve(values: Sequence[float | None]) -> str:
    most = max((value for value in values if value is not None), default=0.0)
    if not most:
        return ""
    return "".join(" " if value is None else _BARS[min(7, int(value / most * 8))] for value in values[-24:])


def _meter(share: float) -> str:
    filled = min(8, round(share * 8))
    return f"{'█' * filled}{'░' * (8 - filled)} {share:4.0%}"


def _middle(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _since(value: float) -> str:
    units: tuple[tuple[float, str], ...] = ((172800, "d"), (5400, "h"), (90, "min"))
    sizes = {"d": 86400, "h": 3600, "min": 60}
    return next((f"{value / sizes[unit]:.0f} {unit}" for least, unit in units if value >= least), f"{value:.0f} s")


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
