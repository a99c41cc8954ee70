"""A thousand requests, a third of which leave at any moment: afterwards every pool, table and cache is as before."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import aiohttp
import pytest

from tests.e2e.mix import Case, chat, counting, session
from tests.support.cluster import APART, ProcessCluster, node_cluster

NUM_REQUESTS = 1000
CONCURRENCY = 32
SHARE_LEAVING = 1 / 3
# Small enough that requests wait, preempt and evict each other, and no lease that nobody releases ends by itself.
TIGHT = ("--kv-mib", "1.75", "--max-model-len", "256", "--embedding-mib", "0.3", "--lease-s", "600", "--max-chunk-tokens", "32")


def case(draw: random.Random, number: int) -> Case:
    """Text or images, known or new, one choice or more, cut short or run to its end."""
    images = [draw.randrange(40) for _ in range(draw.choice((0, 0, 1, 1, 2, 3)))]
    text = counting(draw.randrange(50), draw.randrange(25)) if draw.random() < 0.3 else draw.choice(("Hello", "What do you see?"))
    options = {"max_tokens": draw.randrange(1, 24), "ignore_eos": draw.random() < 0.5, "n": draw.choice((1, 1, 1, 1, 2))}
    return Case(f"request {number}", {**chat(text, images, **options), "temperature": draw.choice((0, 1)), "stream": True})


async def send(client: aiohttp.ClientSession, case: Case, leaves_after: int) -> str:
    """How it ended. `leaves_after`: the client leaves with the piece of this number; 0: with the headers; negative: never."""
    async with client.post(f"/v1/{case.route}", json=case.body) as answer:
        if answer.status != 200:
            return f"status {answer.status}: {await answer.text()}"
        num_pieces = 0
        async for line in answer.content:
            if num_pieces == leaves_after:
                return "left"  # with unread data: the connection is closed
            if line.startswith(b"data: {"):
                num_pieces += 1
                if b'"error"' in line:
                    return line.decode()
            elif line.startswith(b"data: [DONE]"):
                return "finished"
    return "cut off"


async def churn(url: str, seed: int) -> Counter[str]:
    """Send all, `CONCURRENCY` at a time. Of those that leave, half do so at a random time, half with a random piece."""
    draw = random.Random(seed)
    ends: Counter[str] = Counter()
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(client: aiohttp.ClientSession, case: Case, leaves_after: int, patience_s: float | None) -> None:
        async with room:
            try:
                async with asyncio.timeout(patience_s):
                    ends[await send(client, case, leaves_after)] += 1
            except TimeoutError:
                ends["left"] += 1

    async with session(url) as client, asyncio.TaskGroup() as tasks:
        for number in range(NUM_REQUESTS):
            leaves_after, patience_s = -1, None
            if draw.random() < SHARE_LEAVING:
                if draw.random() < 0.5:
                    leaves_after = draw.randrange(8)
                else:
                    patience_s = draw.expovariate(1 / 0.15)
            tasks.create_task(one(client, case(draw, number), leaves_after, patience_s))
    return ends


def check(ends: Counter[str]) -> None:
    """Nothing but leaving ends a request early. Who meant to leave and was served before has finished."""
    assert ends.keys() <= {"finished", "left"}, ends
    assert ends.total() == NUM_REQUESTS
    assert ends["left"] > NUM_REQUESTS * SHARE_LEAVING / 2


async def test_processes_are_idle_after_a_thousand_requests(cluster: ProcessCluster) -> None:
    check(await churn(cluster.url, seed=1))
    cluster.wait_until_idle()


@pytest.mark.parametrize(
    ("layout", "options"),
    [(APART, TIGHT), (APART, (*TIGHT, "--transfer", "socket")), (("gateway,encode", "prefill,decode", "prefill,decode"), TIGHT)],
    ids=["mapped", "socket", "shared pools"],
)
async def test_nodes_under_pressure_are_idle_after_a_thousand_requests(layout: tuple[str, ...], options: tuple[str, ...]) -> None:
    async with node_cluster(layout, *options) as cluster:
        check(await churn(cluster.url, seed=2))
        await cluster.idle()
