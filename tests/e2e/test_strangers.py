"""Who knocks at the links without the secret, and who has it and talks nonsense: answered, and nothing else is touched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from epd.errors import EpdError, Refused
from epd.microkernel.system import System
from protocol.frames import HEADER, Kind
from protocol.handshake import hello_id
from protocol.messages import (
    Address,
    Decode,
    Drain,
    EmbeddingReady,
    EmbeddingRef,
    Encode,
    Endpoint,
    FetchBlocks,
    Join,
    Message,
    MMItem,
    Prefill,
    PullKV,
    RequestId,
    Sampling,
    WorkerId,
)
from tests.e2e.mix import Said, ask, cases, session
from tests.support.cluster import APART, WAIT_S, NodeCluster, node_cluster

TOKEN_IDS = np.arange(10, 30, dtype="<i4").tobytes()
REQUEST = RequestId("nobody's")
GREEDY = Sampling(temperature=0.0, max_tokens=4)


@asynccontextmanager
async def stranger(token: str) -> AsyncIterator[System]:
    system = System(worker=WorkerId("stranger"), token=token)
    await system.start()
    try:
        yield system
    finally:
        await system.stop()


async def check_untouched(cluster: NodeCluster, undisturbed: tuple[Said, ...]) -> None:
    """All nodes run, hold nothing, and serve as before."""
    async with session(cluster.url) as client:
        assert await ask(client, cases()[0]) == undisturbed[0]
        assert await ask(client, cases()[5]) == undisturbed[5]
    await cluster.idle()
    assert not any(member.task.done() for member in cluster.members)


# --- without the secret ---------------------------------------------------------------------------------------------

FIRST_BYTES = {
    "another version": HEADER.pack(Kind.HELLO, 0, 0, 4, hello_id(99)) + b"abcd",
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a frame of 4 GiB": HEADER.pack(Kind.HELLO, 0, 0, 2**32 - 1, hello_id()),
    "65,535 buffers": HEADER.pack(Kind.HELLO, 0, 65535, 4, hello_id()),
    "no greeting": HEADER.pack(Kind.ASK, 0, 0, 4, 1) + b"abcd",
    "nothing that can be read": HEADER.pack(Kind.HELLO, 0, 0, 4, hello_id()) + b"abcd",
    "zeros": bytes(4096),
}


async def test_who_does_not_speak_the_protocol_is_shown_out(undisturbed: tuple[Said, ...]) -> None:
    async with node_cluster(APART) as cluster:
        for name, data in FIRST_BYTES.items():
            for member in cluster.members:
                endpoint = member.endpoint
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                writer.write(data)
                said = b""
                async with asyncio.timeout(WAIT_S):
                    with contextlib.suppress(ConnectionError):
                        said = await reader.read()
                writer.close()
                assert said == b"" or said[0] == Kind.GOODBYE, name
                assert name != "another version" or b"wrong_version" in said
        await check_untouched(cluster, undisturbed)


async def test_who_has_another_secret_is_refused(undisturbed: tuple[Said, ...]) -> None:
    async with node_cluster(APART) as cluster, stranger("not the cluster's secret") as system:
        for member in cluster.members:
            with pytest.raises(Refused, match="token"):
                await system.discover(member.endpoint.host, member.endpoint.port, timeout_s=WAIT_S)
        await check_untouched(cluster, undisturbed)


# --- with the secret ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nonsense:
    """A message that no actor of a sound cluster would send to `role`."""

    role: str
    actor: str
    message: Message


def image(num_tokens: int = 16, grid: tuple[int, int, int] = (1, 8, 8), offset: int = 2) -> MMItem:
    return MMItem("hash", offset, num_tokens, *grid)


def prefill(
    token_ids: bytes = TOKEN_IDS, num_prompt_tokens: int = 20, sampling: Sampling = GREEDY, items: tuple[MMItem, ...] = ()
) -> Prefill:
    return Prefill(REQUEST, 1, token_ids, num_prompt_tokens, items, sampling, 2.0)


NOWHERE = Endpoint(WorkerId("nowhere"), "127.0.0.1", 1)


def decode(token_ids: bytes = TOKEN_IDS, num_prompt_tokens: int = 20) -> Decode:
    gateway = Address(WorkerId("stranger"), "tokens")
    return Decode(REQUEST, 1, token_ids, num_prompt_tokens, (), GREEDY, 2.0, NOWHERE, gateway)


def nonsense() -> list[Nonsense]:
    beyond = np.array([-1, 100_000] * 5, dtype="<i4").tobytes()
    prompts: list[Message] = [
        prefill(TOKEN_IDS[:-1]),
        prefill(b""),
        prefill(num_prompt_tokens=-1),
        prefill(num_prompt_tokens=999),
        prefill(beyond, num_prompt_tokens=10),
        prefill(items=(image(offset=-5),)),
        prefill(items=(image(num_tokens=-3),)),
        prefill(items=(image(num_tokens=5),)),
        prefill(items=(image(grid=(1, 0, 0)),)),
        prefill(items=(image(grid=(4, 2**20, 2**20)),)),
        prefill(items=(image(offset=15),)),
        prefill(sampling=Sampling(logit_bias=((10**9, 1.0),), max_tokens=3)),
    ]
    elsewhere: list[tuple[str, Message]] = [
        ("prefill", PullKV(REQUEST, 1, 123, 1.0)),
        ("prefill", FetchBlocks("kv", 1, 1, (-1, 10**9))),
        ("prefill", EmbeddingReady(REQUEST, 1, 0, EmbeddingRef(WorkerId("nowhere"), 1, 1, 1, "h", 4, (0,), (0,)), NOWHERE)),
        ("encode", FetchBlocks("embedding", 1, 1, ())),
        ("encode", Encode(REQUEST, 1, image(), 2.0)),
        ("encode", Encode(REQUEST, 1, image(num_tokens=-1), 2.0)),
        ("encode", Encode(REQUEST, 1, image(num_tokens=10**7, grid=(1, 10**6, 8)), 2.0)),
        ("decode", decode(TOKEN_IDS[:-1])),
        ("decode", decode(b"")),
        ("decode", decode(num_prompt_tokens=-1)),
        ("decode", decode()),  # pulls from a worker that is not there
    ]
    found = [Nonsense("prefill", "prefill", message) for message in prompts]
    found += [Nonsense(role, role, message) for role, message in elsewhere]
    misdirected = (("prefill", "prefill"), ("decode", "decode"), ("encode", "encode"), ("prefill", "nobody"))
    found += [Nonsense(role, actor, Drain()) for role, actor in misdirected]
    found.append(Nonsense("decode", "membership", prefill()))
    found += [Nonsense("gateway", actor, prefill()) for actor in ("directory", "tokens")]
    found.append(Nonsense("gateway", "directory", Join(NOWHERE, ("cook",), "another model", 1, 1, "cpu", 10, 16)))
    return found


async def test_nonsense_of_a_peer_fails_and_stops_nobody(undisturbed: tuple[Said, ...]) -> None:
    async with node_cluster(APART) as cluster, stranger(cluster.token) as system:
        for member in cluster.members:
            system.introduce(member.endpoint)
        for sent in nonsense():
            (member,) = cluster.with_role(sent.role)
            buffers = (b"junk",) if isinstance(sent.message, Encode) else ()
            with pytest.raises(EpdError):
                await system.ask(Address(member.endpoint.worker, sent.actor), sent.message, buffers, timeout_s=WAIT_S)
            assert not member.node.is_stopping, sent
        await check_untouched(cluster, undisturbed)
