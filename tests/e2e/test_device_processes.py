"""A cluster of processes on one CUDA device: blocks go from process to process by IPC handles, and a killed one harms no other.

Without a device the processes share memory in its place, and what they say must be what the CPU says.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.e2e.mix import Case, Said, ask, ask_at_once, cases, chat, counting, session
from tests.support.cluster import ALL_ROLES, ProcessCluster, get_json, node_cluster, process_cluster

NO_DEVICE = Path(__file__).parent.parent / "support/no_device"
OPTIONS = ("--device", "cuda", "--kv-mib", "32", "--embedding-mib", "8", "--lease-s", "600", "--max-chunk-tokens", "32")
PROMPTS = [Case(f"prompt {number}", chat(counting(number * 37, 90), max_tokens=24, ignore_eos=True)) for number in range(8)]


@contextmanager
def device_cluster(name: str) -> Iterator[ProcessCluster]:
    with pytest.MonkeyPatch.context() as patch:
        if name == "no device":
            patch.setenv("PYTHONPATH", str(NO_DEVICE))
        with process_cluster(*OPTIONS, encode=1, prefill=2, decode=1) as running:
            yield running


@pytest.fixture(scope="module", params=["no device", pytest.param("cuda", marks=pytest.mark.gpu)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cluster(name: str) -> Iterator[ProcessCluster]:
    """Tests leave all four workers there and idle."""
    with device_cluster(name) as running:
        yield running


@pytest.fixture(scope="module")
def wanted() -> list[Said]:
    """What the CPU says to PROMPTS."""

    async def ask_all() -> list[Said]:
        async with node_cluster((ALL_ROLES,)) as alone:
            return await ask_at_once(alone.url, PROMPTS)

    return uvloop.run(ask_all())


async def test_they_say_what_the_cpu_says(name: str, cluster: ProcessCluster, undisturbed: tuple[Said, ...]) -> None:
    said = await ask_at_once(cluster.url, cases()[::3])
    for case, got, should in zip(cases()[::3], said, undisturbed[::3], strict=True):
        if name == "no device":
            assert got == should, case.name
        else:  # bfloat16 rounds otherwise
            assert got.num_prompt_tokens == should.num_prompt_tokens, case.name
    cluster.wait_until_idle()
    assert rungs(await asyncio.to_thread(get_json, f"{cluster.url}/v1/cluster")) == {"mapped"}


async def test_a_prefill_worker_killed_under_transfers(name: str, cluster: ProcessCluster, wanted: list[Said]) -> None:
    """While both prefill workers hand over chunk after chunk, one is killed; its prompts go to the other, decode goes on."""
    before = cluster.workers()
    async with session(cluster.url) as client:
        asked = [asyncio.create_task(ask(client, case)) for case in PROMPTS]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        more = [asyncio.create_task(ask(client, case)) for case in PROMPTS]
        os.kill(before["prefill-0"], signal.SIGKILL)
        said = [await each for each in (*asked, *more)]
    for case, got, should in zip(PROMPTS * 2, said, wanted * 2, strict=True):
        if name == "no device":
            assert got == should, case.name
        else:
            assert got.num_output_tokens == should.num_output_tokens, case.name
    await asyncio.to_thread(cluster.wait_for_workers, list(before), other_than=[before["prefill-0"]])
    after = cluster.workers()
    assert {worker: pid for worker, pid in after.items() if worker != "prefill-0"} == {
        worker: pid for worker, pid in before.items() if worker != "prefill-0"
    }
    cluster.wait_until_idle()  # and no owner has found its pool written to


async def test_a_device_that_fails_under_decode(name: str, cluster: ProcessCluster, wanted: list[Said]) -> None:
    """The process ends with an error, not when its drain time is over, and is started again: its streams go on there."""
    if name != "no device":
        pytest.skip("nobody breaks a real device")
    before = cluster.workers()
    async with session(cluster.url) as client:
        asked = [asyncio.create_task(ask(client, case)) for case in PROMPTS]
        await asyncio.to_thread(cluster.wait_until, lambda: any(map(runs, cluster.stages())), "decode to have begun")
        os.kill(before["decode-0"], signal.SIGUSR1)
        assert [await each for each in asked] == wanted
    await asyncio.to_thread(cluster.wait_for_workers, list(before), other_than=[before["decode-0"]])
    (ended,) = [line for line in cluster.process.errors if "process ended" in line and "decode-0" in line]
    assert "status=1" in ended
    cluster.wait_until_idle()


def runs(stage: dict[str, Any]) -> bool:
    return bool(stage["role"] == "decode" and stage["num_running"])


def rungs(cluster: dict[str, Any]) -> set[str]:
    return {link["rung"] for worker in cluster["workers"] for link in worker["links"]}
