"""`epd top`: a frame of every kind of cluster, what is new joined to what is known, and one real one."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from epd.config import TopConfig, parse
from epd.errors import BadConfig, Unavailable
from epd.exposition import MemberLoad
from epd.gateway.fleet import describe_part
from epd.gateway.observer import Observer
from epd.metrics import GatewayMetrics
from epd.request import Delta, GenerateRequest
from epd.timeline import Timeline
from epd.top import Seen, frame, run
from protocol.messages import LinkLoad, ProcessLoad, RequestId, Sampling, Span, StageLoad, WorkerId
from tests.support.clock import FakeClock

STAGE = StageLoad(
    "decode", 3, 2, num_blocks=8, num_free_blocks=2, cache_hits=1, cache_queries=4, num_evictions=7, busy_s=0.0, num_steps=1
)
LINK = LinkLoad(WorkerId("prefill-0"), "mapped", 4, 2_000_000, 0.5)
PROCESS = ProcessLoad(1.0, 512_000_000, "NVIDIA H200", 0.61, 40_000_000_000, 141_000_000_000, 500.0)


class _Cluster:
    """A gateway's observer that a test can tell what happens, and that answers as the gateway does."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.observer = Observer(GatewayMetrics(), clock=self.clock)
        self.members: list[MemberLoad] = []

    def report(self, *members: MemberLoad) -> None:
        self.members = list(members)
        for member in members:
            self.observer.reported(member)
        self.clock.advance(2.0)

    def live(self, after_moment: int = -1, after_revision: int = 0) -> dict[str, Any]:
        workers = [
            {
                "worker": member.worker,
                "device": "cuda:0" if member.process else "cpu",
                "is_draining": member.is_draining,
                "reported_s_ago": 0.1,
                "stages": [describe_part(stage) for stage in member.stages],
                "links": [describe_part(link) for link in member.links],
                "process": None if member.process is None else describe_part(member.process),
            }
            for member in self.members
        ]
        seen = self.observer.describe(after_moment=after_moment, after_revision=after_revision)
        live = {
            **seen,
            "model": "tiny-vl",
            "workers": workers,
            "is_ready": bool(workers),
            "reason": "waiting for a worker of: decode",
        }
        found: dict[str, Any] = json.loads(json.dumps(live))
        return found

    def request(self, outcome: str = "") -> None:
        timeline = Timeline(self.clock)
        request = GenerateRequest(RequestId("r"), (1,) * 17, (), Sampling(), timeline=timeline)
        watch = self.observer.admitted(request, self.clock())
        timeline.add_reported("prefill", "prefill-0", 0.0, [Span("prefill", 0.0, 0.5)])
        timeline.add_reported("decode", "decode-0", 0.5, [Span("decode", 0.0, 0.5)])
        self.clock.advance(0.5)
        watch.delta(self.clock(), Delta(0, "a", 1))
        self.clock.advance(0.5)
        if outcome:
            watch.finished(self.clock(), outcome)


def _drawn(*lives: dict[str, Any], width: int = 140) -> str:
    seen = Seen()
    for live in lives:
        seen.take(live)
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(frame(seen))
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def _line(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_an_empty_cluster_is_said_to_be_empty() -> None:
    text = _drawn(_Cluster().live())
    for words in ("waiting for a worker of: decode", "no worker has joined", "no request has come yet", "nothing has moved"):
        assert words in text


def test_a_worker_is_one_line_a_stage() -> None:
    cluster = _Cluster()
    cluster.observer.joined(WorkerId("decode-0"), ["decode"])
    cluster.report(MemberLoad(WorkerId("decode-0"), (STAGE,), (LINK,), PROCESS, is_draining=True))
    text = _drawn(cluster.live())
    line = _line(text, "draining")
    for words in ("decode-0", "75%", "25%", "7", "512 MB", "61%", "40 GB"):
        assert words in line, words
    assert "prefill-0 > decode-0" in text
    assert "2 MB" in _line(text, "mapped")
    assert "decode-0 worker joined (decode)" in text


def test_requests_and_the_minute() -> None:
    cluster = _Cluster()
    cluster.request("ok")
    cluster.request("peer_lost")
    cluster.request()
    cluster.clock.advance(2.0)
    text = _drawn(cluster.live())
    assert "1 running" in text
    assert _line(text, "runs").split()[1:3] == ["17", "0"]
    assert "500 ms" in _line(text, "peer_lost")
    # Half of its time in prefill, half in decode: the line is full.
    assert "█" * 40 in _line(text, "ok ")
    assert "/s of" in text


def test_alerts_come_first() -> None:
    cluster = _Cluster()
    cluster.report(MemberLoad(WorkerId("d"), (StageLoad("decode", is_idle_clean=False),)))
    lines = _drawn(cluster.live()).splitlines()
    assert "EpdIntegrityCheckFailed" in lines[1]


def test_what_is_new_is_joined_to_what_is_known() -> None:
    cluster, seen = _Cluster(), Seen()
    assert seen.query() == "after_moment=-1&after_revision=0"
    cluster.request("ok")
    cluster.clock.advance(2.0)
    assert seen.take(cluster.live())
    cluster.request("cancelled")
    cluster.clock.advance(2.0)
    first = seen.moments[-1]["number"]
    assert seen.query() == f"after_moment={first}&after_revision=1"
    assert seen.take(cluster.live(first, 1))
    assert [request["outcome"] for request in seen.requests] == ["ok", "cancelled"]
    numbers = [moment["number"] for moment in seen.moments]
    assert numbers == list(range(len(numbers)))
    # Another gateway, younger than this one, knows nothing of it.
    assert not seen.take(_Cluster().live())
    assert seen.query() == "after_moment=-1&after_revision=0"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(width: int) -> None:
    cluster = _Cluster()
    cluster.report(MemberLoad(WorkerId("decode-0"), (STAGE,), (LINK,), PROCESS))
    cluster.request("ok")
    assert max(map(len, _drawn(cluster.live(), width=width).splitlines())) <= width


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway() -> Iterator[str]:
    cluster = _Cluster()
    cluster.report(MemberLoad(WorkerId("decode-0"), (STAGE,)))
    body = json.dumps(cluster.live()).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers.get("Authorization") == "Bearer a key"
            self.send_response(404 if not self.path.startswith("/v1/cluster/live?") else 200 if is_known else 401)
            self.end_headers()
            self.wfile.write(body if is_known else b"{}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _once(url: str, *words: str) -> str:
    config = parse(["top", "--once", "--url", url, *words])
    assert isinstance(config, TopConfig)
    console = Console(file=io.StringIO(), width=120, color_system=None)
    assert run(config, console) == 0
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def test_one_frame_of_a_gateway(gateway: str) -> None:
    assert "decode-0" in _once(gateway + "/", "--api-key", "a key")


def test_what_is_wrong_is_said(gateway: str) -> None:
    with pytest.raises(BadConfig, match="--api-key"):
        _once(gateway)
    with pytest.raises(Unavailable, match="404"):
        _once(gateway + "/elsewhere")
    with pytest.raises(Unavailable, match="does not answer"):
        _once("http://127.0.0.1:1")
    with pytest.raises(BadConfig, match="--url"):
        parse(["top", "--url", "localhost"])
    with pytest.raises(BadConfig, match="--interval-s"):
        parse(["top", "--interval-s", "0"])
