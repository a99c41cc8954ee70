"""What the stage actors have in common: when they prove what they own, and what that finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from epd.cache.block_pool import BlockPool
from epd.errors import Cancelled, EpdError, InternalError
from epd.microkernel.system import System
from epd.stage import StageActor
from gpu.cpu import CpuBackend
from protocol.messages import Address, Decode, Finished, Message, Prefill, Prefilled, RequestId
from tests.support import stages
from tests.support.stages import DecodeStage, PrefillStage
from tests.support.systems import running, until

PROMPT = [*range(20)]
EACH = [("prefill",), ("decode",), ("prefill", "decode")]


@dataclass
class _Worker:
    """Its stages share a pool where it has both."""

    client: System
    system: System
    stages: dict[str, PrefillStage | DecodeStage] = field(default_factory=dict)

    @property
    def actors(self) -> list[StageActor]:
        return [stage.actor for stage in self.stages.values()]

    @property
    def blocks(self) -> BlockPool:
        return next(iter(self.stages.values())).blocks

    def decode(self, num: int) -> asyncio.Task[Message | EpdError]:
        tokens, gateway = stages.tokens_as_bytes(PROMPT), Address(self.client.worker, "tokens")
        options = stages.sampling(num)
        message = Decode(RequestId("r"), 1, tokens, len(PROMPT), (), options, 10.0, self.system.endpoint, gateway)
        return asyncio.create_task(self._ask("decode", message))

    def prefill(self, num: int) -> asyncio.Task[Message | EpdError]:
        message = Prefill(RequestId("r"), 1, stages.tokens_as_bytes(PROMPT), len(PROMPT), (), stages.sampling(num), 10.0)
        return asyncio.create_task(self._ask("prefill", message))

    async def _ask(self, role: str, message: Message) -> Message | EpdError:
        try:
            return (await self.client.ask(Address(self.system.worker, role), message, timeout_s=20)).message
        except EpdError as error:
            return error


@asynccontextmanager
async def _worker(*roles: str) -> AsyncIterator[_Worker]:
    backend = CpuBackend()
    shared = stages.shared_pool(backend) if len(roles) > 1 else None
    try:
        async with running("client", "w") as (client, system):
            made = _Worker(client, system)
            if "prefill" in roles:
                made.stages["prefill"] = await stages.add_prefill(system, backend, shared=shared)
            if "decode" in roles:
                made.stages["decode"] = await stages.add_decode(system, backend, shared=shared)
            yield made
    finally:
        backend.close()


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages look round when a test lets them."""
    monkeypatch.setattr("epd.stage.SWEEP_S", 1000.0)


@pytest.mark.parametrize("roles", EACH)
async def test_blocks_that_nobody_holds_are_noticed_at_idle(roles: tuple[str, ...]) -> None:
    """Whoever uses the pool, alone or not."""
    async with _worker(*roles) as worker:
        assert worker.blocks.allocate(3)
        for actor in worker.actors:
            actor.look_round()
            assert not actor.is_clean
            with pytest.raises(InternalError, match="block 0 has 1 references, its holders 0"):
                actor.check_integrity()


async def test_a_pause_is_proved_once_however_short_the_work_was_between_two() -> None:
    async with _worker("prefill") as worker:
        (stage,) = worker.stages.values()
        stage.actor.look_round()
        for lost in (False, True):
            assert isinstance(await worker.prefill(1), Prefilled)
            stage.actor.look_round()
            assert stage.actor.is_clean
            assert worker.blocks.allocate(int(lost)) is not None
            stage.actor.look_round()
            assert stage.actor.is_clean  # of this pause it is known already
        assert isinstance(await worker.prefill(1), Prefilled)
        stage.actor.look_round()
        assert not stage.actor.is_clean


async def test_who_is_idle_last_proves_a_shared_pool() -> None:
    async with _worker("prefill", "decode") as worker:
        prefill, decode = worker.stages["prefill"].actor, worker.stages["decode"].actor
        worker.stages["decode"].runner.gate.clear()
        prompt, answer = worker.prefill(9), worker.decode(9)
        assert isinstance(await prompt, Prefilled)
        await until(lambda: prefill.is_idle() and not decode.is_idle())
        assert worker.blocks.allocate(1)
        prefill.look_round()
        decode.look_round()
        assert prefill.is_clean
        worker.stages["decode"].runner.gate.set()
        assert isinstance(await answer, Finished)
        await until(decode.is_idle)
        decode.look_round()
        assert not decode.is_clean


async def test_what_a_neighbour_holds_is_no_leak() -> None:
    async with _worker("prefill", "decode") as worker:
        prefill, decode = worker.stages["prefill"], worker.stages["decode"]
        decode.runner.gate.clear()
        prompt, answer = worker.prefill(9), worker.decode(9)
        assert isinstance(await prompt, Prefilled)
        await until(lambda: prefill.actor.is_idle() and decode.scheduler.num_running == 1)
        prefill.actor.check_integrity()
        decode.actor.check_integrity()
        decode.runner.gate.set()
        assert isinstance(await answer, Finished)


async def test_blocks_that_are_being_taken_over_are_held() -> None:
    """Also when their request has left, until the task that took them has let go."""
    async with _worker("prefill", "decode") as worker:
        prefill, decode = worker.stages["prefill"], worker.stages["decode"]
        assert isinstance(decode, DecodeStage)
        prefill.runner.on_step = lambda plan: prefill.runner.gate.clear()  # one chunk, and no more
        prompt, answer = worker.prefill(9), worker.decode(9)
        await until(lambda: any(adopting.table for adopting in decode.actor._adopting))
        decode.actor._abort(RequestId("r"), 1, Cancelled("for a test"))
        assert decode.scheduler.is_idle()
        assert not decode.actor.is_idle()
        prefill.runner.gate.set()
        assert isinstance(await answer, Cancelled)
        assert isinstance(await prompt, Prefilled | EpdError)
        await until(decode.actor.is_idle)
        await worker.system.unregister("prefill")
