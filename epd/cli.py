"""The `epd` command: the only place that wires a configuration to what it configures."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence

import uvloop

from epd.cluster.banner import banner
from epd.cluster.launcher import BAD_CONFIG_STATUS, TEXT_AND_IMAGES, Launcher, check_port
from epd.cluster.node import Node
from epd.config import ClusterConfig, PlanConfig, ServeConfig, TopConfig, parse
from epd.errors import BadConfig, EpdError
from epd.log import setup


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status: 0 stopped as asked, 1 failed, 2 wrong configuration."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        match config:
            case ServeConfig():
                status = _serve(config)
            case ClusterConfig():
                status = _cluster(config)
            case TopConfig():
                status = _top(config)
            case PlanConfig():
                status = _plan(config)
    except BadConfig as error:
        print(f"epd: {error.message}", file=sys.stderr)
        status = BAD_CONFIG_STATUS
    except EpdError as error:
        print(f"epd: {error.message}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _serve(config: ServeConfig) -> int:
    setup(config.log_level, worker=config.link.worker or "-".join(config.roles))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # every client is an open file
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_run_node(config))
    return 0


async def _run_node(config: ServeConfig) -> None:
    def say(word: str, text: str) -> None:
        is_endpoint = word == "ready" and "gateway" in config.roles
        if config.is_supervised:
            inputs = [TEXT_AND_IMAGES if node.takes_images else "text"] if is_endpoint else []
            print(word, text, *inputs, flush=True)
        elif is_endpoint:
            print(banner([text], config, takes_images=node.takes_images), flush=True)
        else:
            print(f"epd: {word} {text}", flush=True)

    node = Node(config, report=lambda text: say("progress", text), on_ready=lambda text: say("ready", text))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, node.stop)
    if config.is_supervised:
        threading.Thread(target=_stop_at_eof, args=(loop, node), daemon=True).start()
    await node.run()


def _stop_at_eof(loop: asyncio.AbstractEventLoop, node: Node) -> None:
    """The supervisor holds the other end of standard input: when it closes, the supervisor has gone."""
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(node.stop)


def _top(config: TopConfig) -> int:
    from epd.top import run

    return run(config)


def _plan(config: PlanConfig) -> int:
    from epd.sizing.command import answer

    print(answer(config))
    return 0


def _cluster(config: ClusterConfig) -> int:
    setup(config.serve.log_level, worker="cluster")
    http = config.serve.http
    for number in range(config.num_gateways):
        check_port(http.host, http.port + number if http.port else 0)
    return uvloop.run(Launcher(config).run())
