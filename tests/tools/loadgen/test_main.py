from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.tools.loadgen.scripted import DONE, ScriptedServer, Send, Status, Step, answer, event, finish, piece, usage
from tools.loadgen.__main__ import main

SPANS = [{"name": "decode", "stage": "decode", "worker": "d0", "start_s": 0.0, "end_s": 0.001}]


async def run(server: ScriptedServer, *options: str) -> int:
    """The program, in its own thread and on its own loop."""
    return await asyncio.to_thread(main, ["--url", server.url, "--no-progress", *options])


async def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts: list[list[Step]] = [answer([0.0, 0.0]), [Status(429)], [Send(piece("a"))], answer([0.0] * 3)]
    async with ScriptedServer(None, scripts).running() as server:
        files = ("--json", str(tmp_path / "run.json"), "--requests", str(tmp_path / "run.jsonl"))
        status = await run(server, "--num-requests", "6", "--mix", "2x32x32", "--slo", "ttft=60", "--api-key", "hush", *files)
    assert status == 1, "a cut stream is a failure"
    assert {body["model"] for body in server.bodies} == {"scripted"}
    shown = capsys.readouterr().out
    assert "4 ok, 1 refused (429), 1 failed of 6" in shown
    assert "1 x truncated" in shown
    assert "1 x 429" in shown
    assert "66.7 % of the requests within ttft=60" in shown
    found = json.loads((tmp_path / "run.json").read_text())
    (entry,) = found["runs"]
    summary = entry["summary"]
    assert (summary["num_ok"], summary["refusals"], summary["failures"]) == (4, {"429": 1}, {"truncated": 1})
    assert (summary["num_good"], summary["good_share"]) == (4, pytest.approx(4 / 6))
    assert summary["output_tokens"] == 2 + 3 * 3
    assert summary["itl"]["count"] == 1 + 3 * 2
    assert found["settings"]["mix"] == "2x32x32:1"
    assert found["machine"]["cores"] >= 1
    assert "hush" not in (tmp_path / "run.json").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert sorted(line["outcome"] for line in lines) == ["failed", "ok", "ok", "ok", "ok", "refused"]
    assert all(line["e2e_s"] >= line["ttft_s"] >= 0 for line in lines if line["outcome"] == "ok")
    assert next(line["text"] for line in lines if line["outcome"] == "ok") == "w0 w1 "


async def test_nothing_but_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedServer(None, [answer([0.0])]).running() as server:
        assert await run(server) == 0
    assert len(server.bodies) == 100
    assert "100 ok" in capsys.readouterr().out


async def test_an_open_loop_with_warmup(capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedServer(None, [answer([0.0])]).running() as server:
        assert await run(server, "--rate", "500", "--num-requests", "20", "--warmup", "3", "--model", "named") == 0
    assert len(server.bodies) == 23
    assert {body["model"] for body in server.bodies} == {"named"}
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 23, "warming up must not fill a prefix cache"
    assert "20 ok" in capsys.readouterr().out


async def test_a_sweep_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [Send(piece("a") + finish() + usage(3, 1) + event({"choices": [], "epd": {"spans": SPANS}}) + DONE)]
    (tmp_path / "events.json").write_text("[]")
    html = tmp_path / "run.html"
    async with ScriptedServer(None, [told]).running() as server:
        options = ("--sweep", "concurrency=1,2", "--num-requests", "5", "--html", str(html))
        assert await run(server, *options, "--events", str(tmp_path / "events.json"), "--timeline-share", "1") == 0
    assert all(headers.get("x-epd-timeline") == "1" for headers in server.headers)
    assert len(server.bodies) == 10
    shown = capsys.readouterr().out
    assert "1 user " in shown
    assert "2 users" in shown
    page = html.read_text()
    for name in ("Throughput against latency", "Latency CDFs", "Timeline", "Stage waterfall"):
        assert f'aria-label="{name}"' in page


async def test_the_search_for_the_knee(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedServer(None, [answer([0.0])]).running() as server:
        options = (
            "--find-knee",
            "--rate",
            "400",
            "--num-requests",
            "10",
            "--knee-probes",
            "2",
            "--json",
            str(tmp_path / "knee.json"),
        )
        assert await run(server, *options) == 0
    assert len(server.bodies) == 20
    assert "knee: at or above 800 requests/s" in capsys.readouterr().out
    knee = json.loads((tmp_path / "knee.json").read_text())["knee"]
    assert (knee["rate"], knee["ceiling"], [probe["rate"] for probe in knee["probes"]]) == (800, None, [400, 800])


async def test_a_trace_and_chats(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 9, "output_length": 3}\n{"timestamp": 5, "input_length": 8, "output_length": 4}'
    )
    async with ScriptedServer(None, [answer([0.0])]).running() as server:
        assert await run(server, "--trace", str(trace)) == 0
        assert sorted(body["max_tokens"] for body in server.bodies) == [3, 4]
        server.bodies.clear()
        assert await run(server, "--num-requests", "2", "--turns", "3") == 0
    assert [len(body["messages"]) for body in server.bodies] == [1, 3, 5, 1, 3, 5]


async def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["--url", "http://127.0.0.1:1/v1"]) == 2
    assert "loadgen:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "1", "--concurrency", "2"],
        ["--mix", "video"],
        ["--image-reuse", "1.5"],
        ["--output-tokens", "3-1"],
        ["--extra-body", "[]"],
        ["--rate", "-1"],
        ["--rate", "1:2:3"],
        ["--concurrency", "0"],
        ["--sweep", "speed=1"],
        ["--sweep", "rate=1,x"],
        ["--slo", "speed=1"],
        ["--find-knee", "--sweep", "rate=1"],
        ["--find-knee", "--rate", "1:2"],
        ["--trace", "x", "--rate", "1"],
        ["--duration", "5", "--warmup", "5s"],
        ["--warmup", "soon"],
        ["--seed", "-1"],
    ],
)
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--url", "http://127.0.0.1:1/v1", *options])
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompts", "--trace"])
def test_a_missing_file(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1/v1", option, str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
