"""The command line as people use it: stages started one by one, wrong words, a busy port, Ctrl-C."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.cluster import (
    MODEL_NAME,
    SMALL,
    WAIT_S,
    Process,
    children,
    is_alive,
    process_cluster,
    shared_memory_files,
)

TOKEN = "a secret of this test only"


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _start(stack: ExitStack, *words: str, token: str = TOKEN) -> Process:
    process = Process(*words, token=token)
    stack.callback(process.close)
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _count(url: str, last: int = 9, **options: Any) -> str:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": f"Count from 7 to {last}."}],
        "temperature": 0,
        **options,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
        return text


def test_three_stages_by_hand_and_a_gateway_that_comes_last(started: ExitStack) -> None:
    port = _free_port()
    join = ("--join", f"127.0.0.1:{port}", *SMALL)
    workers = [_start(started, "serve", "--roles", role, *join) for role in ("decode", "encode", "prefill")]
    gateway = _start(started, "serve", "--roles", "gateway", "--port", "0", "--cluster-port", str(port), *SMALL)
    url = gateway.line(r"epd is ready at (\S+)")[1]
    for worker in workers:
        worker.line("ready")
    assert _count(url) == "7 8 9"
    for process in [*workers, gateway]:
        process.signal(signal.SIGTERM)
    assert [process.wait() for process in [*workers, gateway]] == [0, 0, 0, 0]


def test_one_process_needs_nobody(started: ExitStack) -> None:
    process = _start(started, "serve", "--port", "0", *SMALL)
    assert _count(process.line(r"epd is ready at (\S+)")[1]) == "7 8 9"
    process.signal(signal.SIGINT)
    assert process.wait() == 0


def test_a_worker_that_serves_something_else_is_told_so(started: ExitStack) -> None:
    port = _free_port()
    gateway = _start(started, "serve", "--roles", "gateway", "--port", "0", "--cluster-port", str(port), *SMALL)
    gateway.line("epd is ready")
    other = _start(started, "serve", "--roles", "decode", "--join", f"127.0.0.1:{port}", "--block-size", "32", *SMALL)
    assert other.wait() == 1
    assert "--block-size" in other.errors[-1]


@pytest.mark.parametrize("command", ["serve", "cluster"])
def test_a_port_that_is_taken_is_said_at_once(started: ExitStack, command: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        roles = ("--roles", "gateway") if command == "serve" else ()
        process = _start(started, command, "--port", port, *roles)
        assert process.wait() == 2
        assert port in process.errors[-1]
        assert "--port" in process.errors[-1] or "in use" in process.errors[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve", "--model", "/nonexistent/folder"), "neither a folder nor a hub id"),
        (("serve", "--roles", "cook"), "cook is not a stage"),
        (("serve", "--device", "cuda:99", "--port", "0"), "CUDA device"),
        (("cluster", "--model", "/tmp"), "config.json"),
        (("serve", "--kv-mib", "0.0001", "--port", "0"), "--kv-mib"),
    ],
)
def test_what_cannot_start_says_why(started: ExitStack, words: tuple[str, ...], said: str) -> None:
    process = _start(started, *words)
    assert process.wait() == 2
    assert said in "\n".join(process.errors)
    assert "Traceback" not in "\n".join(process.errors)


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["cluster", "--help"]])
def test_help_is_there_at_once(words: list[str]) -> None:
    program = (
        "import sys\nfrom epd.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n"
        "    assert left.code == 0\nassert not {'torch', 'numba'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert "usage: epd" in done.stdout


def test_ctrl_c_lets_the_running_request_finish_and_leaves_nothing() -> None:
    with process_cluster(encode=1) as cluster:
        pids = children(cluster.process.pid)
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(_count(cluster.url, 120, max_tokens=2000, ignore_eos=True)))
        asking.start()
        cluster.wait_until(
            lambda: any(stage["num_running"] for stage in cluster.stages() if stage["role"] == "decode"), "a stream"
        )
        cluster.stop()
        asking.join(WAIT_S)
    assert len(answers) == 1
    assert answers[0].startswith("7 8 9 10")
    assert not [pid for pid in pids if is_alive(pid)]
    # Sockets and pools have no names: they went with the processes. What has a name would be here.
    assert not [name for name in shared_memory_files() if "epd" in name]
