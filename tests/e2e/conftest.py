"""What the end-to-end tests share: one ordinary cluster of processes, and what the requests of the mix answer undisturbed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import uvloop

from tests.e2e.mix import Said, ask_one_by_one, cases
from tests.support.cluster import ProcessCluster, node_cluster, process_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[ProcessCluster]:
    """`epd cluster` as a user starts it, but that no lease ends by itself within a test. Tests leave it idle."""
    with process_cluster("--lease-s", "600") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed() -> tuple[Said, ...]:
    """The mix, one request after the other, in one process, with nothing cached but what the mix itself repeats."""

    async def ask() -> list[Said]:
        async with node_cluster() as alone:
            return await ask_one_by_one(alone.url, cases())

    return tuple(uvloop.run(ask()))
