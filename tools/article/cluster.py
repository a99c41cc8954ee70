"""Clusters of emulated devices as processes of this host: which processes there are, and how they start and stop."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp

from epd.devices import parse_workers, step_limits, tokens_beside_decode
from epd.emulated.profile import Profile
from tools.servers import ServerFailed, free_port, thread_environment

_POLL_S = 0.1
_START_S = 120.0
_STOP_S = 10.0
ALL_STAGES = "encode,prefill,decode"
# What a benchmark must not run into; nothing that makes anything faster.
_ROOM = ("--max-requests", "100000", "--max-prompt-tokens", "1000000000", "--request-timeout-s", "3600", "--lease-s", "300")


@dataclass(frozen=True, slots=True)
class Topology:
    """`workers`: the roles of each; `sharing` and `options`: how each of them works."""

    name: str
    workers: tuple[str, ...]
    sharing: str = "fused"
    options: tuple[str, ...] = ()
    placement: str = "apart"

    @property
    def is_baseline(self) -> bool:
        return self.placement == "together"


def traditional(devices: int) -> Topology:
    """Images encoded inline, whole prompts before the next token of anybody."""
    options = ("--token-budget", "65536", "--max-chunk-tokens", "65536")
    return Topology("colocated, prefill first", (ALL_STAGES,) * devices, "prefill-first", options, "together")


def beside_decode(profile: Profile) -> int:
    """Tokens of a prefill step."""
    return tokens_beside_decode(step_limits("cuda"), profile.model.active_share)


def strong(devices: int, profile: Profile) -> Topology:
    """Short prompt chunks beside decode in one step."""
    tokens = str(beside_decode(profile))
    options = ("--token-budget", tokens, "--max-chunk-tokens", tokens)
    return Topology("colocated, chunked", (ALL_STAGES,) * devices, "fused", options, "together")


def disaggregated(name: str, workers: str) -> Topology:
    """epd, with workers as `epd cluster --workers` takes them; each stage of a request where it is done first."""
    kinds = [kind.replace("+", ",") for kind, count in parse_workers(workers).items() for _ in range(count)]
    return Topology(f"epd {name}", tuple(kinds), options=("--token-budget", "2048", "--max-chunk-tokens", "2048"))


@dataclass(frozen=True, slots=True)
class Running:
    """`pids`: the gateway's first, then the workers' in order."""

    url: str
    pids: tuple[int, ...]
    started_s: float  # from the first process to the last worker's joining

    async def describe(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """/v1/cluster."""
        async with session.get(f"{self.url}/v1/cluster") as answer:
            found: dict[str, Any] = await answer.json()
            return found


@asynccontextmanager
async def running(
    topology: Topology, *, model: Path, profile: str, slow: float = 1.0, beat_s: float = 0.0, options: Sequence[str] = ()
) -> AsyncIterator[Running]:
    """A gateway and the topology's workers; nothing of them is left on leaving. With `beat_s`, the devices' steps begin at
    moments that are known (epd.emulated.device): worker i's, i of as many parts of a beat as there are workers after it.

    Raises:
        ServerFailed: one of them ended, or they were not ready in time.
    """
    port, cluster_port = free_port(), free_port()
    environment = os.environ | thread_environment(1) | {"EPD_TOKEN": secrets.token_hex(16)}
    common: tuple[str, ...] = (
        "--model",
        str(model),
        "--served-model-name",
        "emulated",
        "--block-size",
        "64",
        "--max-running",
        "256",
        *_ROOM,
    )
    common = (*common, *topology.options, *options, "--log-level", "warning", "--drain-timeout-s", "0")
    device = f"emulated:{profile}?sharing={topology.sharing}&slow={slow:g}"
    beats = [f"&beat={beat_s:g}&phase={beat_s * number / len(topology.workers):.6f}" for number in range(len(topology.workers))]
    gateway = ("--roles", "gateway", "--port", str(port), "--cluster-port", str(cluster_port), "--placement", topology.placement)
    join = ("--join", f"127.0.0.1:{cluster_port}")
    workers = [
        ("--roles", roles, *join, "--worker", f"worker-{number}", "--device", device + beats[number])
        for number, roles in enumerate(topology.workers)
    ]
    commands = [gateway, *workers]
    url = f"http://127.0.0.1:{port}"
    began = asyncio.get_running_loop().time()
    with tempfile.TemporaryFile() as log:
        processes: list[asyncio.subprocess.Process] = []
        try:
            for words in commands:
                processes.append(await _start([*words, *common], environment, log))
            async with asyncio.timeout(_START_S):
                await _until_joined(url, len(topology.workers), processes)
            yield Running(url, tuple(each.pid for each in processes), asyncio.get_running_loop().time() - began)
        except (TimeoutError, ServerFailed) as error:
            log.seek(0)
            raise ServerFailed(
                f"{topology.name}: {error or 'not ready in time'}\n{log.read()[-3000:].decode(errors='replace')}"
            ) from None
        finally:
            await _stop(processes)


async def _start(words: Sequence[str], environment: dict[str, str], log: IO[bytes]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "epd", "serve", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )


async def _until_joined(url: str, num_workers: int, processes: Sequence[asyncio.subprocess.Process]) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if any(process.returncode is not None for process in processes):
                raise ServerFailed("a process ended while the cluster was starting")
            try:
                async with session.get(f"{url}/v1/cluster") as answer:
                    if len((await answer.json())["workers"]) == num_workers:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_S)


async def _stop(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.returncode is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    pass
        await asyncio.wait([asyncio.ensure_future(process.wait()) for process in processes], timeout=_STOP_S)
