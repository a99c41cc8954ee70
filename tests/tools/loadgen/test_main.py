from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.tools.loadgen.scripted import ScriptedServer, Send, Status, Step, answer, piece
from tools.loadgen.__main__ import main


async def run(server: ScriptedServer, *options: str) -> int:
    """The program, in its own thread and on its own loop."""
    return await asyncio.to_thread(main, ["--url", server.url, "--no-progress", *options])


async def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts: list[list[Step]] = [answer([0.0, 0.0]), [Status(429)], [Send(piece("a"))], answer([0.0] * 3)]
    async with ScriptedServer(None, scripts).running() as server:
        files = ("--json", str(tmp_path / "run.json"), "--requests", str(tmp_path / "run.jsonl"))
        status = await run(server, "--num-requests", "6", "--image-share", "1", "--images-per-request", "2", *files)
    assert status == 1, "a cut stream is a failure"
    assert {body["model"] for body in server.bodies} == {"scripted"}
    shown = capsys.readouterr().out
    assert "4 ok, 1 refused (429), 1 failed of 6" in shown
    assert "1 x cut" in shown
    summary = json.loads((tmp_path / "run.json").read_text())
    assert (summary["num_ok"], summary["num_refused"], summary["failures"]) == (4, 1, {"cut": 1})
    assert summary["output_tokens"] == 2 + 3 * 3
    assert summary["itl"]["count"] == 1 + 3 * 2
    assert summary["settings"]["images_per_request"] == [2, 2]
    assert "api_key" not in summary["settings"]
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert sorted(line["outcome"] for line in lines) == ["cut", "ok", "ok", "ok", "ok", "refused"]
    assert all(line["e2e_s"] >= line["ttft_s"] >= 0 for line in lines if line["outcome"] == "ok")


async def test_an_open_loop_with_warmup(capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedServer(None, [answer([0.0])]).running() as server:
        assert await run(server, "--rate", "500", "--num-requests", "20", "--warmup", "3", "--model", "named") == 0
    assert len(server.bodies) == 23
    assert {body["model"] for body in server.bodies} == {"named"}
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 23, "warming up must not fill a prefix cache"
    assert "20 ok" in capsys.readouterr().out


async def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["--url", "http://127.0.0.1:1/v1"]) == 2
    assert "loadgen:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "1", "--concurrency", "2"],
        ["--image-share", "1.5"],
        ["--images-per-request", "3-1"],
        ["--image-sizes", "64"],
        ["--extra-body", "[]"],
        ["--rate", "-1"],
        ["--concurrency", "0"],
    ],
)
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--url", "http://127.0.0.1:1/v1", *options])
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_missing_prompts_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1/v1", "--prompts", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
