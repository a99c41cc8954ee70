"""What happened to the server during a run: faults, scaling steps, deploys. Marked in the report's timeline.

They come from a file or an endpoint, as JSON lines, as an array, or as {"events": [...]}. An event is an object with its time as
`time` (or `at`, `timestamp`: unix seconds, or milliseconds where they are too large for seconds), what it was as `text` (or
`message`, `name`, `detail`), and its `kind` (or `type`, `event`). Where the object around them has `now`, times are on the clock
that it shows, as in what epd's dashboard reads.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import aiohttp

_TIMES = ("time", "at", "timestamp")
_TEXTS = ("text", "message", "name", "detail")
_KINDS = ("kind", "type", "event")
_MILLISECONDS_FROM = 1e11  # as seconds, the year 5138


@dataclass(frozen=True, slots=True)
class Event:
    at: float  # unix time
    kind: str
    text: str


async def load_events(source: str, session: aiohttp.ClientSession) -> tuple[Event, ...]:
    """Events of a file, or of an http(s) URL, by time.

    Raises:
        ValueError, OSError, aiohttp.ClientError: there are none to be had.
    """
    if source.startswith(("http://", "https://")):
        async with session.get(source, timeout=aiohttp.ClientTimeout(total=30)) as response:
            response.raise_for_status()
            return parse_events(await response.text(), read_at=time.time())
    path = Path(source)
    return parse_events(await asyncio.to_thread(path.read_text), read_at=time.time())


def parse_events(text: str, *, read_at: float) -> tuple[Event, ...]:
    """Events by time; other fields do not matter. `read_at`: unix time at which a `now` in it was now.

    Raises:
        ValueError: it is none of the known shapes.
    """
    try:
        whole = json.loads(text)
    except ValueError:
        whole = [json.loads(line) for line in text.splitlines() if line.strip()]
    ahead_s = 0.0  # of unix time over the clock of the events
    if isinstance(whole, dict) and isinstance(whole.get("now"), int | float):
        ahead_s = read_at - whole["now"]
    if isinstance(whole, dict):
        whole = whole.get("events", [whole])
    if not isinstance(whole, list):
        raise ValueError("events are an array, lines, or an object with events")
    return tuple(sorted((_event(each, ahead_s) for each in whole), key=lambda event: event.at))


def _event(entry: object, ahead_s: float) -> Event:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no event")
    kind = _first(entry, _KINDS)
    return Event(_time(_first(entry, _TIMES)) + ahead_s, str(kind or ""), str(_first(entry, _TEXTS) or kind or ""))


def _first(entry: dict[str, object], names: Sequence[str]) -> object:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _time(value: object) -> float:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            raise ValueError(f"{value!r} is no time") from None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no time of an event")
    return value / 1000.0 if value > _MILLISECONDS_FROM else float(value)
