"""Several gateways in front of the same workers: each answers as if it were alone, and one that dies takes nobody else along."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.mix import Case, Said, ask_at_once, cases, session
from tests.e2e.test_failures import IMAGES, LONG, Trigger, compare, stream
from tests.e2e.test_same_tokens import TIGHT, check
from tests.support.cluster import ProcessCluster, children, get_json, is_ready, node_cluster, process_cluster, wait_until

LAYOUTS = (
    ("gateway", "gateway", "encode", "prefill", "decode"),
    ("gateway", "gateway", "encode,prefill,decode", "prefill,decode"),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
async def test_two_gateways_with_the_same_workers(undisturbed: Sequence[Said], layout: Sequence[str]) -> None:
    async with node_cluster(layout, *TIGHT, "--max-chunk-tokens", "32") as cluster:
        for said in await asyncio.gather(*(ask_at_once(url, cases()) for url in cluster.urls)):
            check(said, undisturbed, cases())
        await cluster.idle()
        assert len(cluster.urls) == 2
        for url in cluster.urls:
            found = await asyncio.to_thread(get_json, f"{url}/v1/cluster")
            assert len(found["workers"]) == len(layout) - 2


async def test_a_worker_that_leaves_tells_both(undisturbed: Sequence[Said]) -> None:
    async with node_cluster(("gateway", "gateway", "encode,prefill,decode", "prefill,decode")) as cluster:
        leaving = cluster.members.pop()
        leaving.node.stop()
        await asyncio.wait_for(leaving.task, 30)
        for url in cluster.urls:
            found = await asyncio.to_thread(get_json, f"{url}/v1/cluster")
            assert [worker["roles"] for worker in found["workers"]] == [["encode", "prefill", "decode"]]
        check(await ask_at_once(cluster.urls[1], cases()), undisturbed, cases())
        await cluster.idle()


@pytest.mark.parametrize("workers", ["encode+prefill+decode:2", "encode:1,prefill:1,decode:1"])
async def test_a_killed_gateway_takes_its_own_streams_along_and_no_others(workers: str) -> None:
    """Early, when images, KV blocks and tokens of its requests are on their way: no worker keeps any of that for longer."""
    of = [*LONG, *IMAGES]
    options = ("--gateways", "2", "--workers", workers, "--max-chunk-tokens", "16", "--lease-s", "600")
    with process_cluster(*options) as cluster:
        first, second = cluster.process.line(r"epd is ready at (\S+) and at (\S+)").groups()
        wait_until(lambda: is_ready(first) and is_ready(second), "both gateways to be ready")
        pids = cluster.workers()
        wanted = {case.name: said for case, said in zip(of, await ask_at_once(second, of), strict=True)}
        kill = Trigger(3, lambda: os.kill(_pid_of(cluster, "gateway-0"), signal.SIGKILL))
        lost, kept = await asyncio.gather(_streams(first, of, kill), _streams(second, of))
        assert all(isinstance(outcome, aiohttp.ClientError) for outcome in lost)
        compare(of, wanted, [outcome for outcome in kept if not isinstance(outcome, BaseException)])
        await asyncio.to_thread(cluster.process.line, r"gateway-0 +ready again")
        wait_until(lambda: is_ready(first) and cluster.workers() == pids, "the gateway to be back with its workers")
        cluster.wait_until_idle()
        compare(LONG, wanted, [outcome for outcome in await _streams(first, LONG) if not isinstance(outcome, BaseException)])


async def _streams(url: str, of: Sequence[Case], trigger: Trigger | None = None) -> list[tuple[str, str, int] | BaseException]:
    async with session(url) as client:
        told = trigger or Trigger(-1, lambda: None)
        return await asyncio.gather(*(stream(client, case, told) for case in of), return_exceptions=True)


def _pid_of(cluster: ProcessCluster, name: str) -> int:
    (pid,) = [pid for pid in children(cluster.process.pid) if name in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
    return pid
