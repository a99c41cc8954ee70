from __future__ import annotations

import asyncio
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tools import with_server
from tools.servers import ServerFailed, free_port, running_server, thread_environment

# Serves the value of an environment variable, and starts a child that outlives it if it can.
_SERVER = """
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
signal.signal(signal.SIGINT, lambda *args: os._exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("OMP_NUM_THREADS", "").encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server_command(port: int) -> list[str]:
    return [sys.executable, "-c", _SERVER, str(port)]


async def test_a_server_is_ready_when_entered_and_gone_with_its_children_when_left() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/ready"
    async with running_server(server_command(port), ready_url=url, environment=thread_environment(7)) as pid:
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())
        assert body == b"7"
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        assert len(family) == 2
    gone, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
    assert (len(gone), alive) == (2, [])


async def test_a_server_that_ends_shows_its_last_words() -> None:
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(4)"]
    with pytest.raises(ServerFailed, match=r"status 4(.|\n)*no such model"):
        async with running_server(command, ready_url="http://127.0.0.1:1/", environment={}):
            pass


async def test_a_server_that_is_never_ready_is_given_up() -> None:
    command = [sys.executable, "-c", "import signal; print('loading', flush=True); signal.pause()"]
    with pytest.raises(ServerFailed, match="not ready in time"):
        async with running_server(command, ready_url="http://127.0.0.1:1/", environment={}, timeout_s=0.5):
            pass


def test_a_command_is_run_against_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def command(port: int, *options: str) -> list[str]:
        asked.append(options)
        return server_command(port)

    monkeypatch.setattr(with_server, "epd_command", command)
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
    script = f"{ask}; open(sys.argv[2], 'w').write(sys.argv[1]); sys.exit(5)"
    out = tmp_path / "url"
    options = ["--model", "m", "--epd", "--num-threads 2"]
    assert with_server.main([*options, "--", sys.executable, "-c", script, "{url}", str(out)]) == 5
    assert asked == [("--model", "m", "--num-threads", "2")]
    assert out.read_text().endswith("/v1")


def test_a_server_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(with_server, "epd_command", lambda port, *options: [sys.executable, "-c", "print('broken')"])
    assert with_server.main(["--", "true"]) == 1
    assert "broken" in capsys.readouterr().err
