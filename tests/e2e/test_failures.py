"""Workers die, hang and leave in the middle of streams, handles go stale, blocks are spoilt: clients get the same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import uvloop

from epd.decode.actor import DecodeActor
from epd.errors import EpdError, InternalError
from epd.prefill.actor import PrefillActor
from epd.stage import StageActor
from epd.transfer.receiver import Receiver
from gpu.errors import DeviceFailed
from gpu.pool import Destination
from protocol.messages import Address, EmbeddingRef, Endpoint, KVRef, ReleaseLease
from tests.e2e.mix import Case, Said, ask, ask_at_once, chat, counting, session
from tests.support.cluster import (
    ALL_ROLES,
    APART,
    ClusterFailed,
    Member,
    NodeCluster,
    ProcessCluster,
    children,
    eventually,
    is_alive,
    mapped_pools,
    node_cluster,
    own_pools,
    process_cluster,
    wait_until,
)

# Long streams, so that there is a middle; short chunks, so that prefill takes a while.
SENTENCES = {"ignore_eos": False, "structured_outputs": {"regex": r"([a-z ]{20,40}\. ){80}"}}
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 5},
    {"temperature": 1.1, "seed": 7, **SENTENCES},
    {"temperature": 0.9, "seed": 6, "top_p": 0.9},
]
LONG = [
    Case(f"stream {number}", chat(f"Count from {number} to 120.", **{"max_tokens": 500, "ignore_eos": True, **way}))
    for number, way in enumerate(WAYS * 2)
]
PROMPTS = [Case(f"prompt {number}", chat(counting(number * 37, 90), max_tokens=40, ignore_eos=True)) for number in range(10)]
IMAGES = [
    Case(
        f"images {number}",
        chat("Describe each image.", range(100 + 3 * number, 103 + 3 * number), max_tokens=40, ignore_eos=True),
    )
    for number in range(10)
]
WORKERS = ("encode-0", "encode-1", "prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def wanted() -> dict[str, Said]:
    """What an undisturbed process answers, by case."""

    async def ask_all() -> list[Said]:
        async with node_cluster((ALL_ROLES,)) as alone:
            return await ask_at_once(alone.url, [*LONG, *PROMPTS, *IMAGES])

    return {case.name: said for case, said in zip([*LONG, *PROMPTS, *IMAGES], uvloop.run(ask_all()), strict=True)}


@pytest.fixture(scope="module")
def pairs() -> Iterator[ProcessCluster]:
    """Two workers of every stage. Tests leave all six there and idle."""
    options = (
        "--max-chunk-tokens",
        "16",
        "--token-budget",
        "32",
        "--max-patches",
        "64",
        "--drain-timeout-s",
        "0.2",
        "--lease-s",
        "600",
    )
    with process_cluster(*options, encode=2, prefill=2, decode=2) as running:
        yield running


# --- streams --------------------------------------------------------------------------------------------------------


async def pieces(client: aiohttp.ClientSession, case: Case) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer."""
    body = {**case.body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.post(f"/v1/{case.route}", json=body) as answer:
        if answer.status != 200:
            raise ClusterFailed(f"{case.name}: {answer.status} {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ClusterFailed(f"{case.name}: {event}")
                yield event


class Trigger:
    """Calls `act` once, in a thread, when the `at`-th piece of text has been received by any of the streams."""

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self._left = at
        self._act = act
        self.task: asyncio.Task[object] | None = None

    def piece(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.task = asyncio.create_task(asyncio.to_thread(self._act))


async def stream(client: aiohttp.ClientSession, case: Case, trigger: Trigger) -> tuple[str, str, int]:
    """Text, finish reason and number of output tokens, put together from the pieces."""
    text, reason, num_tokens = "", "", 0
    async with aclosing(pieces(client, case)) as events:
        async for event in events:
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                trigger.piece()
            num_tokens = event["usage"]["completion_tokens"] if event.get("usage") else num_tokens
    return text, reason, num_tokens


async def disturb(url: str, of: Sequence[Case], wanted: dict[str, Said], at: int, act: Callable[[], object]) -> None:
    """Stream all cases at once, act when `at` pieces were received, and compare what all of them said."""
    trigger = Trigger(at, act)
    async with session(url) as client:
        got = await asyncio.gather(*(stream(client, case, trigger) for case in of))
    assert trigger.task is not None, "the streams ended before the middle"
    await trigger.task
    compare(of, wanted, got)


async def disturb_who_has_work(
    pairs: ProcessCluster, of: Sequence[Case], wanted: dict[str, Said], role: str, act: Callable[[int], object]
) -> tuple[str, int]:
    """As `disturb`, but act on a worker that has been given work of that stage and has done none of it; its name and process.

    All workers of the stage are stopped before the requests come; the others of them then go on.
    """
    pids = {name: pid for name, pid in pairs.workers().items() if name.startswith(role)}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)

    def busy() -> list[str]:
        return [worker["worker"] for worker in pairs.describe()["workers"] for stage in worker["stages"] if is_given(stage)]

    def is_given(stage: dict[str, Any]) -> bool:
        return bool(stage["role"] == role and stage["num_given"])

    async with session(pairs.url) as client:
        streams = asyncio.gather(*(stream(client, case, Trigger(-1, lambda: None)) for case in of))
        await asyncio.to_thread(wait_until, lambda: bool(busy()), f"work for {role}")
        victim = busy()[0]
        act(pids[victim])
        for name in pids.keys() - {victim}:
            os.kill(pids[name], signal.SIGCONT)
        compare(of, wanted, await streams)
    return victim, pids[victim]


def compare(of: Sequence[Case], wanted: dict[str, Said], got: Sequence[tuple[str, str, int]]) -> None:
    for case, said in zip(of, got, strict=True):
        should = wanted[case.name]
        assert said == (should.choices[0].text, should.choices[0].finish_reason, should.num_output_tokens), case.name


def num_retries(cluster: ProcessCluster) -> int:
    return sum("trying again" in line or "encoding again" in line for line in cluster.process.errors)


# --- kill -9 --------------------------------------------------------------------------------------------------------


def check_nothing_left_of(pools: set[int], cluster: ProcessCluster) -> None:
    """No survivor keeps a dead worker's memory, and nobody has made shared memory with a name."""
    pids = list(cluster.workers().values())

    def still_mapped() -> list[int]:
        return [pid for pid in pids if pools & mapped_pools(pid).keys()]

    wait_until(lambda: not still_mapped(), "the survivors to let go of the dead pool", still_mapped)
    for pid in pids:
        assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("victim", ["decode-0", "encode-1"])
async def test_a_killed_worker(pairs: ProcessCluster, wanted: dict[str, Said], victim: str) -> None:
    pid = pairs.workers()[victim]
    pools = own_pools(pid)
    assert pools
    before = num_retries(pairs)
    await disturb(pairs.url, LONG, wanted, at=40, act=lambda: os.kill(pid, signal.SIGKILL))
    if victim.startswith("decode"):
        assert num_retries(pairs) > before
    await asyncio.to_thread(pairs.wait_for_workers, WORKERS, other_than=[pid])
    check_nothing_left_of(pools, pairs)
    pairs.wait_until_idle()


@pytest.mark.parametrize(("role", "of"), [("prefill", PROMPTS), ("encode", IMAGES)], ids=["prefill", "encode"])
async def test_a_worker_killed_with_work_ahead(
    pairs: ProcessCluster, wanted: dict[str, Said], role: str, of: Sequence[Case]
) -> None:
    pools = {pid: own_pools(pid) for pid in pairs.workers().values()}
    before = num_retries(pairs)
    _, pid = await disturb_who_has_work(pairs, of, wanted, role, lambda pid: os.kill(pid, signal.SIGKILL))
    assert num_retries(pairs) > before
    await asyncio.to_thread(pairs.wait_for_workers, WORKERS, other_than=[pid])
    assert pools[pid]
    check_nothing_left_of(pools[pid], pairs)
    pairs.wait_until_idle()


async def test_a_killed_worker_that_had_all_stages(wanted: dict[str, Said]) -> None:
    options = ("--workers", "encode+prefill+decode:2", "--max-chunk-tokens", "16", "--budget-beside-decode", "32")
    with process_cluster(*options, "--max-patches", "64", "--lease-s", "600") as cluster:
        names = ["encode-prefill-decode-0", "encode-prefill-decode-1"]
        pid = cluster.workers()[names[0]]
        pools = own_pools(pid)
        await disturb(cluster.url, [*LONG, *IMAGES], wanted, at=80, act=lambda: os.kill(pid, signal.SIGKILL))
        assert num_retries(cluster) > 0
        await asyncio.to_thread(cluster.wait_for_workers, names, other_than=[pid])
        check_nothing_left_of(pools, cluster)
        cluster.wait_until_idle()


async def test_a_killed_gateway_is_back_and_has_its_workers(pairs: ProcessCluster, wanted: dict[str, Said]) -> None:
    """Its streams end with it, as there is nobody to send them; the workers drop what it had asked and join the next one."""
    workers = pairs.workers()
    (gateway,) = set(children(pairs.process.pid)) - set(workers.values())
    async with session(pairs.url) as client:
        with pytest.raises(aiohttp.ClientError):
            await stream(client, LONG[0], Trigger(20, lambda: os.kill(gateway, signal.SIGKILL)))
    await asyncio.to_thread(pairs.process.line, r"gateway +ready again")
    await asyncio.to_thread(pairs.wait_for_workers, WORKERS)
    assert pairs.workers() == workers
    assert (await ask_at_once(pairs.url, LONG[:1]))[0] == wanted[LONG[0].name]
    pairs.wait_until_idle()


# --- a worker that hangs --------------------------------------------------------------------------------------------


async def test_a_worker_that_hangs(pairs: ProcessCluster, wanted: dict[str, Said]) -> None:
    """Its heartbeats are missed; its requests go on elsewhere. When it wakes up it is a member again, with nothing left in it."""
    pid = pairs.workers()["decode-1"]
    before = num_retries(pairs)
    try:
        await disturb(pairs.url, LONG, wanted, at=40, act=lambda: os.kill(pid, signal.SIGSTOP))
        assert num_retries(pairs) > before
        assert "decode-1" not in pairs.workers()
    finally:
        os.kill(pid, signal.SIGCONT)
    await check_back(pairs, "decode-1", pid)


async def test_a_worker_that_hangs_with_work_ahead(pairs: ProcessCluster, wanted: dict[str, Said]) -> None:
    before = num_retries(pairs)
    victim, pid = await disturb_who_has_work(pairs, PROMPTS, wanted, "prefill", lambda pid: None)
    try:
        assert num_retries(pairs) > before
        assert victim not in pairs.workers()
    finally:
        os.kill(pid, signal.SIGCONT)
    await check_back(pairs, victim, pid)


async def check_back(pairs: ProcessCluster, worker: str, pid: int) -> None:
    await asyncio.to_thread(pairs.wait_for_workers, WORKERS)
    assert pairs.workers()[worker] == pid
    pairs.wait_until_idle()


# --- a stage that crashes -------------------------------------------------------------------------------------------

# Whoever waits for the drain of what has crashed waits in vain, and longer than any test.
PATIENT = ("--drain-timeout-s", "600", "--lease-s", "600")
TWO_OF_ALL = ("gateway", "encode,prefill,decode", "encode,prefill,decode")


def break_device(stage: StageActor) -> None:
    """No step works there from now on."""

    def fail(*_: object) -> None:
        raise DeviceFailed("an illegal address")

    setattr(stage._runner, "encode_patches" if stage.role == "encode" else "execute", fail)  # type: ignore[attr-defined]


async def check_ended(cluster: NodeCluster, member: Member, role: str) -> None:
    """The node has ended by itself, and says why."""
    await asyncio.wait([member.task], timeout=30)
    assert member.task.done()
    cluster.members.remove(member)
    with pytest.raises(InternalError, match=f"the actor '{role}' crashed: DeviceFailed: an illegal address"):
        member.task.result()


@pytest.mark.parametrize(("role", "at"), [("encode", 0), ("prefill", 0), ("decode", 80)])
async def test_a_stage_that_crashes_ends_its_process_at_once(wanted: dict[str, Said], role: str, at: int) -> None:
    """Its requests, and those of the other stages there, go on at the other worker."""
    of = [*LONG, *IMAGES]
    async with node_cluster(TWO_OF_ALL, *PATIENT, "--max-chunk-tokens", "16") as cluster:
        victim = cluster.members[1]
        if at:
            await disturb(cluster.url, of, wanted, at, lambda: break_device(victim.stage(role)))
        else:
            break_device(victim.stage(role))
            await disturb(cluster.url, of, wanted, 1, lambda: None)
        await check_ended(cluster, victim, role)
        await cluster.idle()


async def test_a_stage_that_crashes_while_it_is_drained(wanted: dict[str, Said]) -> None:
    async with node_cluster(TWO_OF_ALL, *PATIENT) as cluster:
        victim = cluster.members[1]
        stage, loop = victim.stage("decode"), asyncio.get_running_loop()
        async with session(cluster.url) as client:
            trigger = Trigger(40, lambda: loop.call_soon_threadsafe(victim.node.stop))
            streams = asyncio.gather(*(stream(client, case, trigger) for case in LONG))
            await eventually(partial(is_draining, stage), "the worker to be drained")
            assert not stage.is_idle()
            break_device(stage)
            compare(LONG, wanted, await streams)
        await check_ended(cluster, victim, "decode")
        await cluster.idle()


async def is_draining(stage: StageActor) -> bool:
    return stage.is_draining


@pytest.mark.parametrize(("at", "name"), [(0, "directory"), (0, "tokens"), (1, "membership"), (1, "pulse")])
async def test_whoever_crashes_the_process_does_not_live_on_without_it(
    at: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_cluster(TWO_OF_ALL, *PATIENT) as cluster:
        member = cluster.members[at]
        assert member.node.system is not None

        async def broken(_: object) -> None:
            raise ZeroDivisionError("not a number")

        monkeypatch.setattr(member.node.system._cells[name].actor, "receive", broken)
        asker = cluster.members[1 - at].node.system
        assert asker is not None
        with contextlib.suppress(EpdError):
            await asker.tell(Address(member.endpoint.worker, name), ReleaseLease(1), timeout_s=5)
        await asyncio.wait([member.task], timeout=30)
        assert member.task.done()
        cluster.members.remove(member)
        with pytest.raises(InternalError, match=f"the actor '{name}' crashed: ZeroDivisionError"):
            member.task.result()


async def test_a_stage_that_crashes_beside_its_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else can go on with its requests: their clients are told so, and the process ends."""
    monkeypatch.setattr("epd.http.app._CLOSE_S", 0.01)  # whoever has not been told when the endpoint closes is cut off
    async with node_cluster((ALL_ROLES,), *PATIENT) as cluster:
        (alone,) = cluster.members
        trigger = Trigger(10, lambda: break_device(alone.stage("decode")))
        async with session(cluster.url) as client:
            ends = await asyncio.gather(*(stream(client, case, trigger) for case in LONG[:3]), return_exceptions=True)
        for end in ends:
            assert isinstance(end, ClusterFailed)
            assert "unavailable" in str(end)
        await check_ended(cluster, alone, "decode")


# --- leaving --------------------------------------------------------------------------------------------------------


async def test_a_worker_that_leaves(pairs: ProcessCluster, wanted: dict[str, Said]) -> None:
    """It is told to go in the middle of streams, which do not end within its drain time: they go on at the other one."""
    pid = pairs.workers()["decode-0"]
    await disturb(pairs.url, LONG, wanted, at=40, act=lambda: os.kill(pid, signal.SIGTERM))
    wait_until(lambda: not is_alive(pid), "the drained worker to end")
    await asyncio.to_thread(pairs.wait_for_workers, WORKERS, other_than=[pid])
    pairs.wait_until_idle()


def test_workers_end_with_a_killed_launcher() -> None:
    with process_cluster(encode=1) as cluster:
        pids = children(cluster.process.pid)
        assert len(pids) == 4
        cluster.process.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), "all processes to end", cluster.process.output)


# --- spoilt transfers -----------------------------------------------------------------------------------------------


class Spoiler:
    """Stands between a receiver and its first `times` pulls of one kind of handle."""

    def __init__(self, kind: type[KVRef | EmbeddingRef], times: int = 1) -> None:
        self.kind = kind
        self.times = times
        self.num_spoilt = 0

    def put_before(self, receiver: Receiver, spoil: Callable[[Any], Any]) -> None:
        """`spoil` gets the handle and returns the one to pull with."""
        pull = receiver.pull

        async def spoilt_pull(ref: Any, source: Endpoint, dst: Destination, dst_ids: Sequence[int]) -> None:
            if isinstance(ref, self.kind) and self.num_spoilt < self.times:
                self.num_spoilt += 1
                ref = spoil(ref)
            await pull(ref, source, dst, dst_ids)

        receiver.pull = spoilt_pull  # type: ignore[method-assign]


@pytest.mark.parametrize("transfer", ["mapped", "socket"])
async def test_a_block_that_changes_after_its_checksum_is_refused(wanted: dict[str, Said], transfer: str) -> None:
    """Also the prefix cache, which still holds the spoilt block, is not believed the second time."""
    case = PROMPTS[0]
    async with node_cluster(APART, "--transfer", transfer) as cluster:
        prefill, decode = cluster.with_role("prefill")[0].stage("prefill"), cluster.with_role("decode")[0].stage("decode")
        assert isinstance(prefill, PrefillActor)
        assert isinstance(decode, DecodeActor)

        def spoil(ref: KVRef) -> KVRef:
            block = np.asarray(prefill._memory.read(ref.block_ids[len(ref.block_ids) // 2 :])[0])
            block[len(block) // 3] ^= 0x40
            return ref

        spoiler = Spoiler(KVRef)
        spoiler.put_before(decode._receiver, spoil)
        async with session(cluster.url) as client:
            assert await ask(client, case) == wanted[case.name]
            assert spoiler.num_spoilt == 1
            assert prefill.num_steps >= 2
        await cluster.idle()


def other_generation(ref: Any) -> Any:
    return msgspec.structs.replace(ref, generation=ref.generation ^ 1)


def other_layout(ref: Any) -> Any:
    return msgspec.structs.replace(ref, layout=ref.layout ^ 1)


def outside(ref: Any) -> Any:
    return msgspec.structs.replace(ref, block_ids=(10**6, *ref.block_ids[1:]))


def other_checksum(ref: Any) -> Any:
    return msgspec.structs.replace(ref, checksums=(ref.checksums[0] ^ 1, *ref.checksums[1:]))


@pytest.mark.parametrize("transfer", ["mapped", "socket"])
@pytest.mark.parametrize("spoil", [other_generation, other_layout, outside, other_checksum])
async def test_a_wrong_handle_is_refused(wanted: dict[str, Said], spoil: Callable[[Any], Any], transfer: str) -> None:
    """One KV handoff and one embedding each: prefilled again, encoded again, same tokens."""
    async with node_cluster(APART, "--transfer", transfer) as cluster:
        kv, embedding = Spoiler(KVRef), Spoiler(EmbeddingRef)
        prefill, decode = cluster.with_role("prefill")[0].stage("prefill"), cluster.with_role("decode")[0].stage("decode")
        assert isinstance(prefill, PrefillActor)
        assert isinstance(decode, DecodeActor)
        kv.put_before(decode._receiver, spoil)
        embedding.put_before(prefill._receiver, spoil)
        of = [IMAGES[0], LONG[0]]
        assert await ask_at_once(cluster.url, of) == [wanted[case.name] for case in of]
        assert (kv.num_spoilt, embedding.num_spoilt) == (1, 1)
        await cluster.idle()


async def test_a_lease_that_ends_before_the_fetch_is_noticed(wanted: dict[str, Said]) -> None:
    async with node_cluster(APART, "--transfer", "socket") as cluster:
        prefill, decode = cluster.with_role("prefill")[0].stage("prefill"), cluster.with_role("decode")[0].stage("decode")
        assert isinstance(prefill, PrefillActor)
        assert isinstance(decode, DecodeActor)

        def end_lease(ref: KVRef) -> KVRef:
            assert prefill._blocks.release(ref.lease_id)
            return ref

        spoiler = Spoiler(KVRef, times=2)
        spoiler.put_before(decode._receiver, end_lease)
        assert await ask_at_once(cluster.url, PROMPTS[:3]) == [wanted[case.name] for case in PROMPTS[:3]]
        assert spoiler.num_spoilt == 2
        await cluster.idle()
