from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tools.loadgen.client import open_session
from tools.loadgen.events import Event, load_events, parse_events

LINES = '{"time": 20.5, "kind": "fault", "text": "d0 died"}\n\n{"at": 10, "type": "scale"}'
EVENTS = (Event(10.0, "scale", "scale"), Event(20.5, "fault", "d0 died"))


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        '[{"time": 20.5, "kind": "fault", "message": "d0 died"}, {"timestamp": 10, "event": "scale"}]',
        '{"events": [{"at": 20.5, "kind": "fault", "detail": "d0 died"}, {"at": 10, "kind": "scale"}]}',
        # On a clock of its own, which shows 5 when the unix time is 25.
        '{"now": 5, "events": [{"at": 0.5, "kind": "fault", "text": "d0 died"}, {"at": -10, "kind": "scale"}]}',
    ],
)
def test_the_shapes_of_events(text: str) -> None:
    assert parse_events(text, read_at=25.0) == EVENTS


def test_times_as_people_and_programs_write_them() -> None:
    entries = [{"time": "2026-11-23T06:00:00+00:00"}, {"time": 1795413600000}]
    assert {event.at for event in parse_events(json.dumps(entries), read_at=0.0)} == {1795413600.0}


@pytest.mark.parametrize("text", ["nope", "3", "[3]", '{"kind": "fault"}', '{"time": "soon"}', '{"time": true}'])
def test_no_events(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of the parser or of ours
        parse_events(text, read_at=0.0)


async def test_events_of_a_file_and_of_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(LINES)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=LINES)

    app = web.Application()
    app.router.add_get("/events", answer)
    async with TestServer(app) as server, open_session() as session:
        assert await load_events(str(server.make_url("/events")), session) == EVENTS
        assert await load_events(str(tmp_path / "events.jsonl"), session) == EVENTS
