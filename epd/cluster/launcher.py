"""`epd cluster`: starts the processes of a whole cluster on this machine, restarts those that die, stops all of them in order.

Owns: the processes. Knows: which command starts which worker, what their progress lines say. Does not know: what they do.

A process tells its progress in lines on its standard output (`progress TEXT` and `ready TEXT`, a gateway `ready URL INPUTS`). Its
standard input stays open as long as this process lives: when it closes, the process stops by itself, so that nothing outlives a
killed launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from epd.cluster.banner import banner
from epd.config import ClusterConfig
from epd.errors import BadConfig
from epd.log import Log

BAD_CONFIG_STATUS = 2
FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 10.0
STEADY_S = 30.0  # a process that lived this long starts again without back-off
KILL_GRACE_S = 5.0
TEXT_AND_IMAGES = "text+images"  # what a gateway says that its model takes; anything else: text
_log = Log("cluster")


@dataclass(slots=True)
class _Member:
    """One supervised process."""

    name: str
    roles: str  # as --roles has them
    arguments: tuple[str, ...]
    port: int = 0  # of a gateway's endpoint; 0: any free one
    url: str = ""  # of a gateway, once it has told
    process: asyncio.subprocess.Process | None = None
    is_ready: bool = False
    num_starts: int = 0
    keeper: asyncio.Task[None] | None = field(default=None, repr=False)


class Launcher:
    """Run once: `await run()` returns the exit status after everything has stopped."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._cluster_ports = _free_ports(config.num_gateways)
        self._environment = dict(os.environ, EPD_TOKEN=secrets.token_hex(32), EPD_API_KEY=config.serve.http.api_key)
        self._members = [*self._describe()]
        self._width = max(12, *(len(member.name) for member in self._members))
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._status = 0
        self._takes_images = False  # the model does, as its gateways have told

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        names = ", ".join(member.name for member in self._members)
        print(f"epd: starting {names}", flush=True)
        for member in self._members:
            member.keeper = asyncio.create_task(self._keep(member), name=f"keep {member.name}")
        try:
            await self._stop.wait()
        finally:
            await self._stop_all()
        return self._status

    # --- processes --------------------------------------------------------------------------------------------------

    def _describe(self) -> Sequence[_Member]:
        config = self._config
        members: list[_Member] = []
        for number, cluster_port in enumerate(self._cluster_ports):
            name = f"gateway-{number}" if config.num_gateways > 1 else "gateway"
            port = config.serve.http.port + number if config.serve.http.port else 0
            members.append(_Member(name, "gateway", ("--worker", name, "--cluster-port", str(cluster_port)), port))
        join = ",".join(f"127.0.0.1:{port}" for port in self._cluster_ports)
        for kind, seats in config.seats.items():
            for number, seat in enumerate(seats):
                name = f"{kind.replace('+', '-')}-{number}"
                roles = kind.replace("+", ",")
                place = ("--device", seat.device, "--memory-fraction", str(seat.memory_fraction))
                members.append(_Member(name, roles, ("--worker", name, "--join", join, *place)))
        return members

    async def _keep(self, member: _Member) -> None:
        """Start the process, and again whenever it ends by itself."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while not self._stop.is_set():
            started = loop.time()
            member.process = await self._start(member)
            await self._listen(member, member.process)
            status = await member.process.wait()
            member.is_ready = False
            if self._stop.is_set():
                return
            if status == BAD_CONFIG_STATUS:
                # Its own message is on standard error already. Starting it again would only repeat it.
                self._fail(status)
                return
            if loop.time() - started > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            _log.warning("process ended, starting it again", process=member.name, status=status, in_s=backoff_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stop.wait()
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _start(self, member: _Member) -> asyncio.subprocess.Process:
        member.num_starts += 1
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "epd", "serve", *self._words(member)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for this process, which stops the others in order
        )

    def commands(self) -> dict[str, list[str]]:
        """What each process is started with, by its name: the arguments of `epd serve`."""
        return {member.name: self._words(member) for member in self._members}

    def _words(self, member: _Member) -> list[str]:
        own = ("--supervised", "--roles", member.roles, "--model", self._config.serve.model)
        # A gateway that starts again is where it was, also if the port was any free one the first time.
        port = member.url.rpartition(":")[2] or str(member.port)
        return [*own, *member.arguments, *self._config.passed_on, *(("--port", port) if member.roles == "gateway" else ())]

    async def _listen(self, member: _Member, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            word, _, text = raw.decode(errors="replace").strip().partition(" ")
            if word == "progress":
                print(f"  {member.name:<{self._width}} {text}", flush=True)
            elif word == "ready":
                self._on_ready(member, text)

    def _on_ready(self, member: _Member, text: str) -> None:
        again = " again" if member.num_starts > 1 else ""
        taken = f" in {text}" if text and member.roles != "gateway" else ""
        print(f"  {member.name:<{self._width}} ready{again}{taken}", flush=True)
        member.is_ready = True
        if member.roles == "gateway":
            member.url, _, inputs = text.partition(" ")
            self._takes_images = inputs == TEXT_AND_IMAGES
        if all(other.is_ready for other in self._members) and not again:
            urls = [other.url for other in self._members if other.url]
            print(banner(urls, self._config.serve, takes_images=self._takes_images), flush=True)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    def _fail(self, status: int) -> None:
        self._status = status
        self._stop.set()

    async def _stop_all(self) -> None:
        """Gateways first, which let running requests finish; then the workers, which have nothing left."""
        print("epd: stopping (again Ctrl-C to stop at once)", flush=True)
        gateways = [member for member in self._members if member.roles == "gateway"]
        workers = [member for member in self._members if member.roles != "gateway"]
        await self._stop_some(gateways, self._config.serve.admission.drain_timeout_s + KILL_GRACE_S)
        await self._stop_some(workers, KILL_GRACE_S)
        for member in self._members:
            if member.keeper is not None:
                member.keeper.cancel()
        await asyncio.gather(*(member.keeper for member in self._members if member.keeper), return_exceptions=True)
        print("epd: stopped", flush=True)

    async def _stop_some(self, members: Sequence[_Member], timeout_s: float) -> None:
        running = [member.process for member in members if member.process is not None and member.process.returncode is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        ended = asyncio.create_task(_all_ended(running))
        force = asyncio.create_task(self._force.wait())
        await asyncio.wait((ended, force), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        force.cancel()
        for process in running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        await ended


async def _all_ended(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        await process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, for the cluster's own links."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def check_port(host: str, port: int) -> None:
    """Raises BadConfig when the HTTP port is taken, before anything is started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadConfig(f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port") from error
