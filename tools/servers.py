"""Starts a server as a process of its own, waits until it can serve, and stops it with everything that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

_POLL_S = 0.25


class ServerFailed(Exception):
    """It ended, or was not ready in time; the message ends with the last lines of its output."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def epd_command(port: int, *options: str) -> list[str]:
    """All stages in one process, on the API port `port` and any port for other workers."""
    return [sys.executable, "-m", "epd", "serve", "--port", str(port), "--cluster-port", "0", "--log-level", "warning", *options]


def transformers_command(port: int, model: str) -> list[str]:
    """The continuous-batching server of transformers, in float32 on the CPU."""
    program = str(Path(sys.executable).with_name("transformers"))
    options = ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    return [program, "serve", model, *options, "--host", "127.0.0.1", "--port", str(port)]


def flood_command(port: int, *, tokens_per_s: float, num_tokens: int) -> list[str]:
    """A server that computes nothing and streams `num_tokens` tokens to whoever asks, so many a second."""
    return [sys.executable, "-m", "tools.bench.flood", str(port), "--rate", str(tokens_per_s), "--num-tokens", str(num_tokens)]


def thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that give the usual numeric libraries `num_threads` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | {name: str(num_threads) for name in names}


@asynccontextmanager
async def running_server(
    command: Sequence[str], *, ready_url: str, environment: Mapping[str, str], timeout_s: float = 180.0
) -> AsyncIterator[int]:
    """Yields the process id once `ready_url` answers 200. On leaving, the process group is gone.

    Raises:
        ServerFailed: it did not come up.
    """
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await _wait_until_ready(process, ready_url)
            except (TimeoutError, ServerFailed) as error:
                log.seek(0)
                tail = log.read()[-3000:].decode(errors="replace")
                raise ServerFailed(f"{command[0]}: {str(error) or 'not ready in time'}\n{tail}") from None
            yield process.pid
        finally:
            await _stop(process)


async def _wait_until_ready(process: asyncio.subprocess.Process, url: str) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while process.returncode is None:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_S)
    raise ServerFailed(f"ended with status {process.returncode}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind
    except ProcessLookupError:
        pass
    await process.wait()
