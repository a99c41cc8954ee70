"""Whole clusters to test against: as nodes in this event loop, or as the processes that `epd cluster` starts.

Every wait is bounded by WAIT_S, and what it waited for is in the failure. Both kinds listen on ports that the system chooses and
share a secret of their own, so that any number of them run side by side.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from epd.cluster.node import Node
from epd.config import ServeConfig, parse
from epd.errors import EpdError
from epd.options import BUNDLED_MODEL
from epd.stage import StageActor
from gpu.errors import BrokenPool
from protocol.messages import Endpoint

WAIT_S = 120.0
"""Bound of every wait in a test; far more than it takes."""

ALL_ROLES = "gateway,encode,prefill,decode"
APART = ("gateway", "encode", "prefill", "decode")
MODEL_NAME = BUNDLED_MODEL.name
SMALL = ("--num-threads", "1", "--log-level", "warning")
_POLL_S = 0.005


class ClusterFailed(AssertionError):
    """A cluster did not do what a test relies on; says what it did."""


# --- nodes in this loop ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Member:
    """A node that runs in this loop."""

    node: Node
    config: ServeConfig
    task: asyncio.Task[None] = field(repr=False)
    ready: asyncio.Event
    told: list[str]  # what it reported as ready: of a gateway its URL

    @property
    def endpoint(self) -> Endpoint:
        assert self.node.system is not None
        return self.node.system.endpoint

    def stage(self, role: str) -> StageActor:
        return next(stage for stage in self.node.stages if stage.role == role)


class NodeCluster:
    """Nodes with links over real loopback sockets between them. Made by `node_cluster`."""

    def __init__(self, token_file: Path, options: Sequence[str]) -> None:
        self.members: list[Member] = []
        self.urls: list[str] = []  # of the gateways
        self._token_file = token_file
        self._options = tuple(options)
        self._join: tuple[str, ...] = ()

    async def add(self, roles: str, *options: str) -> Member:
        """Start a node and wait until it serves, or has joined."""
        words = ["serve", "--roles", roles, "--port", "0", "--cluster-port", "0", "--token-file", str(self._token_file)]
        config = parse([*words, *SMALL, *self._options, *self._join, *options])
        assert isinstance(config, ServeConfig)
        ready = asyncio.Event()
        told: list[str] = []

        def on_ready(text: str) -> None:
            told.append(text)
            ready.set()

        node = Node(config, report=lambda text: None, on_ready=on_ready)
        task = asyncio.create_task(node.run(), name=f"node {roles}")
        member = Member(node, config, task, ready, told)
        self.members.append(member)
        waiter = asyncio.ensure_future(ready.wait())
        await asyncio.wait([task, waiter], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if task.done():
            task.result()  # raises what ended it
        if not ready.is_set():
            raise ClusterFailed(f"node {roles} was not ready within {WAIT_S} s")
        if "gateway" in roles:
            self.urls.append(told[0])
            gateways = [f"127.0.0.1:{each.endpoint.port}" for each in self.with_role("gateway")]
            self._join = ("--join", ",".join(gateways))
        return member

    @property
    def url(self) -> str:
        """Of the first gateway."""
        return self.urls[0]

    @property
    def token(self) -> str:
        return self._token_file.read_text()

    def with_role(self, role: str) -> list[Member]:
        return [member for member in self.members if role in member.config.roles]

    def stages(self) -> Iterator[StageActor]:
        for member in self.members:
            yield from member.node.stages

    async def cluster(self) -> dict[str, Any]:
        return await asyncio.to_thread(get_json, f"{self.url}/v1/cluster")

    async def ready(self) -> None:
        """Until every gateway says that it has a worker of every role."""
        for url in self.urls:
            await eventually(partial(asyncio.to_thread, is_ready, url), "the cluster to be ready")

    async def idle(self) -> None:
        """Until nothing is held for any request anywhere, every owner agrees, and nothing was found wrong on the way."""
        wrong = ""

        async def nothing_held() -> bool:
            nonlocal wrong
            try:
                for member in self.members:
                    member.node.check_integrity()
            except (EpdError, BrokenPool) as error:
                wrong = str(error)
                return False
            return True

        await eventually(nothing_held, "every node to be idle", lambda: wrong)
        assert all(stage.is_clean for stage in self.stages())

    async def stop(self) -> None:
        """Workers after the gateway, as the launcher does it. Raises what a node failed with."""
        for member in sorted(self.members, key=lambda member: "gateway" not in member.config.roles):
            member.node.stop()
            await asyncio.wait([member.task], timeout=WAIT_S)
            if not member.task.done():
                member.task.cancel()
                raise ClusterFailed(f"node {member.config.roles} did not stop within {WAIT_S} s")
        for member in self.members:
            member.task.result()


@asynccontextmanager
async def node_cluster(layout: Sequence[str] = (ALL_ROLES,), *options: str) -> AsyncIterator[NodeCluster]:
    """A running cluster of one node per entry of `layout`; the first hosts the gateway. At the end nothing of it is left."""
    before = asyncio.all_tasks()
    with tempfile.TemporaryDirectory() as folder:
        token_file = Path(folder) / "token"
        token_file.write_text(secrets.token_hex(16))
        cluster = NodeCluster(token_file, options)
        try:
            for roles in layout:
                await cluster.add(roles)
            await cluster.ready()
            yield cluster
        finally:
            await cluster.stop()
    await eventually(lambda: _done(asyncio.all_tasks() - before), "all tasks to end", lambda: asyncio.all_tasks() - before)


# --- processes ------------------------------------------------------------------------------------------------------


class Process:
    """A command of epd as a process, its output collected line by line."""

    def __init__(self, *words: str, token: str = "", environment: dict[str, str] | None = None) -> None:
        self.words = words
        self.token = token or secrets.token_hex(16)
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "epd", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "EPD_TOKEN": self.token, **(environment or {})},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, pattern: str, *, number: int = 1) -> re.Match[str]:
        """The match of the line number `number` of standard output that `pattern` is found in, once it is there."""

        def matches() -> list[re.Match[str]]:
            return [match for line in self.lines if (match := re.search(pattern, line))]

        with self._changed:
            self._changed.wait_for(lambda: len(matches()) >= number or self.process.poll() is not None, WAIT_S)
            if len(found := matches()) < number:
                raise ClusterFailed(f"no line with {pattern!r} within {WAIT_S} s\n{self.output()}")
            return found[number - 1]

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, *, timeout_s: float = WAIT_S) -> int:
        """The exit status, once all output has been read."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ClusterFailed(f"epd {' '.join(self.words)} did not end within {timeout_s} s\n{self.output()}") from None
        for reader in self._readers:
            reader.join(WAIT_S)
        return status

    def close(self) -> None:
        """End it, however it is, with all that it has started."""
        for pid in [*children(self.pid), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(WAIT_S)
        for reader in self._readers:
            reader.join(WAIT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def output(self) -> str:
        return "\n".join([f"epd {' '.join(self.words)}", *self.lines[-40:], "--- standard error", *self.errors[-60:]])

    def _read(self, pipe: IO[str], into: list[str]) -> None:
        for line in pipe:
            with self._changed:
                into.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class ProcessCluster:
    """`epd cluster` with its processes. Made by `process_cluster`."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.url = process.line(r"epd is ready at (\S+)")[1]

    def describe(self) -> dict[str, Any]:
        """/v1/cluster."""
        return get_json(f"{self.url}/v1/cluster")

    def workers(self) -> dict[str, int]:
        """Process id by worker name."""
        return {worker["worker"]: worker["pid"] for worker in self.describe()["workers"]}

    def stages(self) -> list[dict[str, Any]]:
        return [stage for worker in self.describe()["workers"] for stage in worker["stages"]]

    def rungs(self) -> set[tuple[str, str]]:
        """(role of the puller, rung) of every link over which something has moved."""
        return {
            (worker["roles"][0], link["rung"])
            for worker in self.describe()["workers"]
            for link in worker["links"]
            if link["num_transfers"]
        }

    def kill(self, worker: str, number: int = signal.SIGKILL) -> int:
        """Send a worker's process a signal; returns its id."""
        pid = self.workers()[worker]
        os.kill(pid, number)
        return pid

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, self.process.output)

    def wait_for_workers(self, names: Sequence[str], *, other_than: Sequence[int] = ()) -> None:
        """Until these workers are members, under other process ids than those given."""

        def all_there() -> bool:
            workers = self.workers()
            return all(name in workers and workers[name] not in other_than for name in names) and is_ready(self.url)

        self.wait_until(all_there, f"the workers {', '.join(names)} to be there")

    def wait_until_idle(self) -> None:
        """Until every stage says by a report from now on that nothing runs, waits, is leased or missing, and all was in order."""
        asked = time.monotonic()

        def all_idle() -> bool:
            cluster = self.describe()
            # A report that was made before the last request had ended says nothing.
            fresh = all(worker["reported_s_ago"] < time.monotonic() - asked for worker in cluster["workers"])
            return fresh and cluster["num_running"] == 0 and all(is_idle_stage(stage) for stage in self.stages())

        def busy() -> str:
            stages = [(worker["worker"], stage) for worker in self.describe()["workers"] for stage in worker["stages"]]
            shown = [f"{name}: {stage}" for name, stage in stages if not is_idle_stage(stage)]
            return "\n".join([f"{self.describe()['num_running']} running", *shown])

        wait_until(all_idle, "every pool, table and cache to be idle", busy)

    def stop(self, number: int = signal.SIGINT) -> list[str]:
        """Ctrl-C; it must end with status 0 and leave no process. Returns what it said on standard error."""
        pids = children(self.process.pid)
        assert pids, "a cluster without processes"
        self.process.signal(number)
        status = self.process.wait()
        left = [pid for pid in pids if is_alive(pid)]
        if status != 0 or left:
            raise ClusterFailed(f"status {status}, processes left {left}\n{self.process.output()}")
        return self.process.errors


@contextmanager
def process_cluster(*options: str, encode: int = 2, prefill: int = 1, decode: int = 1) -> Iterator[ProcessCluster]:
    """A running cluster, stopped with Ctrl-C at the end, unless the test did so itself."""
    counts = ("--encode", str(encode), "--prefill", str(prefill), "--decode", str(decode))
    process = Process("cluster", "--port", "0", *SMALL, *counts, *options)
    try:
        cluster = ProcessCluster(process)
        yield cluster
        if process.process.poll() is None:
            cluster.stop()
    except BaseException:
        print(process.output(), file=sys.stderr)  # pytest shows it with the failure
        raise
    finally:
        process.close()


# --- what the kernel knows ------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in words]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def mapped_pools(pid: int) -> dict[int, str]:
    """Inode -> name of the pool memory that a process has mapped, its own and others'."""
    found = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/memfd:epd-"):
            found[int(words[4])] = words[5].removeprefix("/memfd:").removesuffix(" (deleted)")
    return found


def own_pools(pid: int) -> set[int]:
    """Inodes of the pool memory that a process holds a descriptor of: what it has made itself."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:epd-"):
                found.add(entry.stat().st_ino)
        except FileNotFoundError:
            continue
    return found


def shared_memory_files() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def listening_sockets() -> set[str]:
    """Abstract Unix sockets of workers on this machine."""
    return set(re.findall(r"@epd-[0-9a-f]+", Path("/proc/net/unix").read_text()))


# --- help -----------------------------------------------------------------------------------------------------------


def get_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        body: dict[str, Any] = json.load(answer)
        return body


def is_ready(url: str) -> bool:
    try:
        return bool(get_json(f"{url}/ready")["ready"])
    except urllib.error.HTTPError:
        return False


def is_idle_stage(stage: dict[str, Any]) -> bool:
    """Whether a stage's report in /v1/cluster says that nothing is held and nothing was found wrong."""
    held = ("num_waiting", "num_running", "num_leases", "outstanding_patches", "outstanding_tokens")
    return not any(stage[name] for name in held) and stage["num_free_blocks"] == stage["num_blocks"] and stage["is_idle_clean"]


def wait_until(condition: Callable[[], bool], what: str, shown: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterFailed(f"waited {WAIT_S} s for {what}\n{shown()}")
        time.sleep(_POLL_S)


async def eventually(condition: Callable[[], Any], what: str, shown: Callable[[], object] = lambda: "") -> None:
    """Let the loop run until `condition`, a coroutine function, holds."""
    deadline = time.monotonic() + WAIT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise ClusterFailed(f"waited {WAIT_S} s for {what}\n{shown()}")
        await asyncio.sleep(_POLL_S)


async def _done(tasks: set[asyncio.Task[Any]]) -> bool:
    return not tasks
