from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from epd.errors import EpdError, Refused, Unavailable
from epd.gateway.fleet import Fleet
from epd.gateway.observer import Observer
from epd.gateway.placement import Placement
from epd.metrics import GatewayMetrics
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.system import System
from epd.request import GenerateRequest
from protocol.messages import Address, Join, Joined, Leave, LinkLoad, Message, ReportLoad, RequestId, Sampling, StageLoad
from tests.support.clock import FakeClock
from tests.support.stages import item
from tests.support.systems import running, until

LAYOUT = 5
REQUEST = GenerateRequest(RequestId("r"), tuple(range(40)), (), Sampling())


@asynccontextmanager
async def _fleet(*, needs_encode: bool = True) -> AsyncIterator[tuple[Fleet, System, System]]:
    clock = FakeClock()
    async with running("gateway", "w") as (gateway, worker):
        fleet = Fleet(
            Placement(block_size=4),
            model="m",
            layout=LAYOUT,
            block_size=4,
            needs_encode=needs_encode,
            clock=clock,
            observer=Observer(GatewayMetrics(), clock=clock),
        )
        await gateway.register("directory", fleet)
        yield fleet, gateway, worker


def _join(system: System, *roles: str, layout: int = LAYOUT, max_model_len: int = 100) -> Join:
    return Join(system.endpoint, roles, "m", layout, 1, "cpu", max_model_len, 4)


DIRECTORY = Address("gateway", "directory")  # type: ignore[arg-type]


async def test_a_worker_joins_reports_and_leaves() -> None:
    async with _fleet() as (fleet, _, worker):
        assert fleet.missing_roles() == ("encode", "prefill", "decode")
        answer = await worker.ask(DIRECTORY, _join(worker, "prefill", "decode"), timeout_s=5)
        assert isinstance(answer.message, Joined)
        assert fleet.missing_roles() == ("encode",)
        load = StageLoad("prefill", num_blocks=10, num_free_blocks=4, busy_s=2.0, num_tokens=1000)
        link = LinkLoad(worker.worker, "mapped", 3, 100, 0.5)
        await worker.tell(DIRECTORY, ReportLoad(worker.worker, (load, StageLoad("decode")), (link,)))
        await until(lambda: fleet.members()[0].stages[0].num_blocks == 10)
        described = json.loads(json.dumps(fleet.describe()))["workers"]
        assert [worker["roles"] for worker in described] == [["prefill", "decode"]]
        assert described[0]["links"][0]["rung"] == "mapped"
        assert [stage["token_s"] for stage in described[0]["stages"]] == [0.002, 0.0]
        await worker.tell(DIRECTORY, Leave(worker.worker))
        await until(lambda: not fleet.is_alive(worker.worker))
        assert fleet.missing_roles() == ("encode", "prefill", "decode")


class _Told(Actor):
    """Stands for a worker's membership."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    async def receive(self, mail: Mail) -> None:
        self.messages.append(mail.message)


async def test_a_worker_that_is_no_member_and_does_not_know_is_told() -> None:
    async with _fleet() as (fleet, _, worker):
        told = _Told()
        await worker.register("membership", told)
        report = ReportLoad(worker.worker, (StageLoad("decode"),), ())
        await worker.tell(DIRECTORY, report)
        await until(lambda: told.messages == [Leave(worker.worker)])
        assert not fleet.is_alive(worker.worker)
        await worker.ask(DIRECTORY, _join(worker, "decode"), timeout_s=5)
        await worker.tell(DIRECTORY, report)
        await worker.ask(DIRECTORY, _join(worker, "decode"), timeout_s=5)  # behind the report
        assert len(told.messages) == 1


async def test_a_worker_with_another_model_is_refused() -> None:
    async with _fleet() as (fleet, _, worker):
        with pytest.raises(Refused, match="--model"):
            await worker.ask(DIRECTORY, _join(worker, "decode", layout=6), timeout_s=5)
        assert not fleet.is_alive(worker.worker)


async def test_a_worker_on_another_kind_of_device_is_refused() -> None:
    async with _fleet() as (_, gateway, worker):
        await worker.ask(DIRECTORY, _join(worker, "decode"), timeout_s=5)
        other = msgspec.structs.replace(_join(gateway, "prefill"), device="cuda:0", block_format="bfloat16 sum64")
        with pytest.raises(Refused, match=r"on cuda:0 has blocks in bfloat16 sum64.* same kind of --device"):
            await worker.ask(DIRECTORY, other, timeout_s=5)
        again = msgspec.structs.replace(_join(worker, "decode"), block_format="bfloat16 sum64")
        assert isinstance((await worker.ask(DIRECTORY, again, timeout_s=5)).message, Joined)  # nobody else is there


async def test_a_lost_link_removes_the_worker() -> None:
    async with _fleet() as (fleet, _, worker):
        await worker.ask(DIRECTORY, _join(worker, "decode"), timeout_s=5)
        await worker.stop()
        await until(lambda: not fleet.is_alive(worker.worker))


async def test_text_models_need_no_encode_worker() -> None:
    async with _fleet(needs_encode=False) as (fleet, _, worker):
        await worker.ask(DIRECTORY, _join(worker, "prefill", "decode"), timeout_s=5)
        assert fleet.missing_roles() == ()


async def test_work_waits_for_a_worker_and_not_for_ever() -> None:
    async with _fleet() as (fleet, _, worker):
        with pytest.raises(Unavailable, match="prefill"):
            await fleet.place(REQUEST.token_ids, REQUEST, salt="", avoid=frozenset(), timeout_s=0)
        waiting = asyncio.create_task(fleet.place(REQUEST.token_ids, REQUEST, salt="", avoid=frozenset(), timeout_s=20))
        await worker.ask(DIRECTORY, _join(worker, "prefill"), timeout_s=5)
        await asyncio.sleep(0)
        assert not waiting.done()
        await worker.ask(DIRECTORY, _join(worker, "prefill", "decode"), timeout_s=5)
        placed = await waiting
        assert placed.prefill == placed.decode == worker.endpoint
        placed.prefilled()
        placed.release()
        fleet.check_integrity()
        assert [fleet._placement.num_given(worker.worker, role) for role in ("prefill", "decode")] == [0, 0]


async def _expected_cached(fleet: Fleet, salt: str = "") -> tuple[int, int]:
    """Tokens of the request that prefill and decode are expected to have."""
    placed = await fleet.place(REQUEST.token_ids, REQUEST, salt=salt, avoid=frozenset(), timeout_s=0)
    placed.failed("prefill")  # so that asking alters nothing
    of_prefill, of_decode = placed.assignments
    return of_prefill.num_cached_tokens, of_decode.num_cached_tokens


@pytest.mark.parametrize(
    ("failed", "is_prefilled", "expected"),
    [
        (None, False, (39, 40)),
        ("prefill", False, (0, 0)),
        ("decode", False, (39, 0)),
        ("decode", True, (39, 0)),
        ("encode", False, (39, 0)),
    ],
)
async def test_what_failed_is_not_expected_in_caches(failed: str | None, is_prefilled: bool, expected: tuple[int, int]) -> None:
    async with _fleet() as (fleet, _, worker):
        await worker.ask(DIRECTORY, _join(worker, "prefill", "decode"), timeout_s=5)
        placed = await fleet.place(REQUEST.token_ids, REQUEST, salt="", avoid=frozenset(), timeout_s=0)
        if is_prefilled:
            placed.prefilled()
        if failed is not None:
            placed.failed(failed)
        placed.release()
        assert await _expected_cached(fleet) == expected
        assert await _expected_cached(fleet) == expected
        fleet.check_integrity()
        assert [fleet._placement.num_given(placed.decode.worker, role) for role in ("prefill", "decode")] == [0, 0]


async def test_nobody_is_expected_to_have_cached_what_has_another_salt() -> None:
    async with _fleet() as (fleet, _, worker):
        await worker.ask(DIRECTORY, _join(worker, "prefill", "decode"), timeout_s=5)
        (await fleet.place(REQUEST.token_ids, REQUEST, salt="", avoid=frozenset(), timeout_s=0)).release()
        assert await _expected_cached(fleet, "salt") == (0, 0)
        assert await _expected_cached(fleet) == (39, 40)


async def test_an_encoder_is_busy_while_it_is_used() -> None:
    async with _fleet() as (fleet, _, worker):
        await worker.ask(DIRECTORY, _join(worker, "encode", "prefill", "decode"), timeout_s=5)
        placed = await fleet.place(REQUEST.token_ids, REQUEST, salt="", avoid=frozenset(), timeout_s=0)
        async with fleet.encoder(item(b"x", 0, 3), placed, avoid=frozenset(), timeout_s=1) as endpoint:
            assert endpoint == worker.endpoint
            assert fleet._placement.num_given(worker.worker, "encode") == 1
        with pytest.raises(EpdError):
            async with fleet.encoder(item(b"x", 0, 3), placed, avoid=frozenset(), timeout_s=1):
                raise Unavailable("it failed")
        assert fleet._placement.num_given(worker.worker, "encode") == 0


async def test_the_shortest_context_of_all_text_workers_counts() -> None:
    async with _fleet() as (fleet, gateway, worker):
        assert fleet.max_model_len(80) == 80
        await worker.ask(DIRECTORY, _join(worker, "prefill", max_model_len=60), timeout_s=5)
        await gateway.ask(DIRECTORY, _join(gateway, "encode", max_model_len=10), timeout_s=5)
        assert fleet.max_model_len(80) == 60
