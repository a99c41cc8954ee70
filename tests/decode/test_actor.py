"""Decode and prefill of several workers, without a gateway: who gives way to whom where both take blocks from one pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from epd.errors import Cancelled, EpdError
from epd.microkernel.system import System
from gpu.cpu import CpuBackend
from protocol.messages import Abort, Address, Decode, Finished, Message, Preempted, Prefill, Prefilled, RequestId
from tests.support import stages
from tests.support.clock import FakeClock
from tests.support.stages import DecodeStage, PrefillStage
from tests.support.systems import running, until

NUM_BLOCKS = stages.MAX_LEN // stages.BLOCK_SIZE  # one request of the greatest length
LONG = [*range(40)]


@dataclass
class _Worker:
    system: System
    prefill: PrefillStage
    decode: DecodeStage
    clock: FakeClock  # each worker's own, so that only one loses patience

    def sweep(self) -> None:
        self.decode.actor.sweep(self.clock())

    @property
    def num_blocks_short(self) -> int:
        return self.prefill.scheduler.num_blocks_short(self.clock(), 0.0)


@dataclass
class _Bench:
    client: System
    workers: dict[str, _Worker]

    async def _ask(self, worker: str, role: str, message: Message) -> Message | EpdError:
        try:
            return (await self.client.ask(Address(self.workers[worker].system.worker, role), message, timeout_s=20)).message
        except EpdError as error:
            return error

    def decode(self, name: str, prompt: list[int], num: int, *, at: str, prefill: str) -> asyncio.Task[Message | EpdError]:
        source = self.workers[prefill].system.endpoint
        gateway = Address(self.client.worker, "tokens")
        message = Decode(
            RequestId(name), 1, stages.tokens_as_bytes(prompt), len(prompt), (), stages.sampling(num), 10.0, source, gateway
        )
        return asyncio.create_task(self._ask(at, "decode", message))

    def prefill(self, name: str, prompt: list[int], num: int, *, at: str) -> asyncio.Task[Message | EpdError]:
        message = Prefill(RequestId(name), 1, stages.tokens_as_bytes(prompt), len(prompt), (), stages.sampling(num), 10.0)
        return asyncio.create_task(self._ask(at, "prefill", message))


@asynccontextmanager
async def _bench() -> AsyncIterator[_Bench]:
    """Workers a and b, each with both stages over one pool."""
    backend = CpuBackend()
    try:
        async with running("client", "a", "b") as (client, *systems):
            bench = _Bench(client, {})
            for system in systems:
                clock = FakeClock()
                shared = stages.shared_pool(backend, num_blocks=NUM_BLOCKS)
                prefill = await stages.add_prefill(system, backend, shared=shared, clock=clock)
                decode = await stages.add_decode(system, backend, shared=shared, clock=clock)
                bench.workers[system.worker] = _Worker(system, prefill, decode, clock)
            yield bench
            await until(
                lambda: all(each.decode.actor.is_idle() and each.prefill.actor.is_idle() for each in bench.workers.values())
            )
            for each in bench.workers.values():
                each.prefill.actor.check_integrity()
                assert each.prefill.blocks.is_idle()
    finally:
        backend.close()


async def test_two_workers_that_wait_for_each_others_blocks_do_not_wait_for_ever() -> None:
    """Each has reserved blocks for a prompt that the other is to compute, and now has none for its own."""
    async with _bench() as bench:
        a, b = bench.workers["a"], bench.workers["b"]
        over_there = bench.decode("ab", LONG, 4, at="b", prefill="a")
        over_here = bench.decode("ba", LONG[::-1], 4, at="a", prefill="b")
        await until(lambda: a.decode.scheduler.num_receiving == b.decode.scheduler.num_receiving == 1)
        prompt_here, prompt_there = bench.prefill("ab", LONG, 4, at="a"), bench.prefill("ba", LONG[::-1], 4, at="b")
        await until(lambda: a.num_blocks_short > 0 and b.num_blocks_short > 0)
        for worker in (a, b):
            worker.sweep()
        assert not over_here.done()
        a.clock.advance(1.01)
        a.sweep()  # who loses patience first; the other sees to it within as much again
        assert isinstance(await over_here, Preempted)
        prefilled, finished = await prompt_here, await over_there
        assert isinstance(prefilled, Prefilled)
        assert [prefilled.token.token_id] == stages.expected_tokens(LONG, 1)
        assert isinstance(finished, Finished)
        assert finished.num_output_tokens == 4
        await bench.client.tell(Address(b.system.worker, "prefill"), Abort(RequestId("ba"), 1))
        assert isinstance(await prompt_there, Cancelled)
        assert (a.decode.actor.load().num_preemptions, b.decode.actor.load().num_preemptions) == (1, 0)


async def test_who_is_being_computed_elsewhere_does_not_give_way() -> None:
    """Some of its KV is here: it frees its blocks by itself, and so does who is decoded."""
    async with _bench() as bench:
        a, b = bench.workers["a"], bench.workers["b"]
        b.prefill.runner.on_step = lambda plan: b.prefill.runner.gate.clear()  # one chunk, and no more
        decode = bench.decode("ba", LONG, 4, at="a", prefill="b")
        prefill = bench.prefill("ba", LONG, 4, at="b")
        await until(lambda: any(entry.copying and entry.copying.has_begun for entry in a.decode.actor._entries.values()))
        prompt, answer = bench.prefill("aa", LONG[::-1], 4, at="a"), bench.decode("aa", LONG[::-1], 4, at="a", prefill="a")
        await until(lambda: a.num_blocks_short > 0)
        a.clock.advance(1.01)
        a.sweep()
        assert len(a.decode.actor._entries) == 2
        a.decode.runner.gate.clear()
        b.prefill.runner.on_step = lambda plan: None
        b.prefill.runner.gate.set()
        assert isinstance(await prefill, Prefilled)
        await until(lambda: a.decode.scheduler.num_running == 1)
        a.sweep()
        a.decode.runner.gate.set()
        assert isinstance(await decode, Finished)
        assert isinstance(await prompt, Prefilled)
        assert isinstance(await answer, Finished)
        assert b.decode.actor.load().num_preemptions == a.decode.actor.load().num_preemptions == 0


async def test_while_prefill_has_waited_long_for_blocks_decode_reserves_none() -> None:
    """What gets free would else go to whoever asks for little, again and again."""
    async with _bench() as bench:
        a = bench.workers["a"]
        a.decode.runner.gate.clear()
        running_prompt, running_decode = (
            bench.prefill("aa", LONG, 4, at="a"),
            bench.decode("aa", LONG, 4, at="a", prefill="a"),
        )
        assert isinstance(await running_prompt, Prefilled)
        await until(lambda: a.decode.scheduler.num_running == 1)
        long_decode = bench.decode("long", LONG[::-1], 4, at="a", prefill="a")
        long_prompt = bench.prefill("long", LONG[::-1], 4, at="a")
        await until(lambda: a.prefill.scheduler.num_waiting == 1)
        await until(lambda: a.num_blocks_short > 0)
        a.clock.advance(1.01)
        small = bench.decode("small", [1, 2, 3], 2, at="a", prefill="b")
        await until(lambda: a.decode.scheduler.num_waiting == 1)
        a.sweep()
        await asyncio.sleep(0)
        assert a.decode.scheduler.num_waiting == 1
        a.decode.runner.gate.set()
        assert isinstance(await running_decode, Finished)
        assert isinstance(await long_prompt, Prefilled)
        assert isinstance(await long_decode, Finished)
        small_prompt = bench.prefill("small", [1, 2, 3], 2, at="b")
        assert isinstance(await small_prompt, Prefilled)
        assert isinstance(await small, Finished)
