"""The prefill stage alone, with a runner whose KV can be checked."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from epd.errors import StaleHandle
from epd.step import StepPlan
from gpu.cpu import CpuBackend
from protocol.messages import Address, FetchBlocks, Handoff, KVChunk, KVRef, Prefill, Prefilled, PullKV, RequestId
from tests.support import stages
from tests.support.clock import FakeClock
from tests.support.systems import running, until


async def test_chunks_are_cut_by_what_steps_have_taken() -> None:
    """A runner on whose clock attention is dear: what the stage was told of it is an eighth."""
    backend, clock = CpuBackend(), FakeClock()
    steps: list[tuple[int, int]] = []

    def take(plan: StepPlan) -> None:
        (sequence,) = plan.sequences
        start, count = sequence.num_computed_tokens, len(sequence.token_ids)
        steps.append((start, count))
        clock.now += 0.01 * (count + 0.08 * count * (start + count / 2))

    try:
        async with running("client", "prefill") as (client, server):
            stage = await stages.add_prefill(server, backend, budget=8, pair_cost=0.01, clock=clock)
            stage.runner.on_step = take
            for number in range(4):
                prompt = [number * 100 + place for place in range(60)]
                message = Prefill(RequestId(f"r{number}"), 1, stages.tokens_as_bytes(prompt), 60, (), stages.sampling(1), 10.0)
                answer = await client.ask(Address(server.worker, "prefill"), message, timeout_s=20)
                assert isinstance(answer.message, Prefilled)
                assert [answer.message.token.token_id] == stages.expected_tokens(prompt, 1)
    finally:
        backend.close()
    first, last = steps[: steps.index((0, 8), 1)], steps[-next(i for i, step in enumerate(reversed(steps), 1) if step[0] == 0) :]
    assert len(last) > len(first) > 60 / 8
    assert dict(last)[40] == 4


async def test_a_pull_for_what_nobody_computes_here_is_refused_soon() -> None:
    """Its prefill was given up, or went to somebody else: the request has minutes left, and must begin anew."""
    backend, clock = CpuBackend(), FakeClock()
    try:
        async with running("client", "prefill") as (client, server):
            stage = await stages.add_prefill(server, backend, clock=clock)
            message = PullKV(RequestId("r"), 1, stage.memory.layout, 600.0)

            async def pull() -> None:
                async with aclosing(client.stream(Address(server.worker, "prefill"), message, timeout_s=600.0)) as answers:
                    async for _ in answers:
                        pass

            task = asyncio.create_task(pull())
            await until(lambda: not stage.actor.is_idle())
            clock.advance(4.9)
            stage.actor.sweep(clock())
            assert not stage.actor.is_idle()
            clock.advance(0.2)
            stage.actor.sweep(clock())
            with pytest.raises(StaleHandle, match="no longer"):
                await task
            assert stage.actor.is_idle()
    finally:
        backend.close()


async def test_what_is_done_waits_for_decode_as_long_as_its_asker_is_there() -> None:
    """Decode may be full for longer than a lease lasts."""
    backend, clock = CpuBackend(), FakeClock()
    try:
        async with running("gateway", "decode", "prefill") as (gateway, decode, server):
            stage = await stages.add_prefill(server, backend, clock=clock)
            to = Address(server.worker, "prefill")
            for name in ("fetched", "left"):
                prompt = stages.tokens_as_bytes([ord(name[0]), 1, 2, 3, 4])
                await gateway.ask(to, Prefill(RequestId(name), 1, prompt, 5, (), stages.sampling(9), 600.0), timeout_s=20)
            clock.advance(300.0)
            stage.actor.sweep(clock())
            message = PullKV(RequestId("fetched"), 1, stage.memory.layout, 300.0)
            async with aclosing(decode.stream(to, message, timeout_s=20)) as answers:
                kinds = [type(answer.message) async for answer in answers]
            assert kinds == [KVChunk, Handoff]
            assert len(stage.actor._entries) == 1
            await gateway.stop()
            await until(lambda: not stage.actor._entries)
            clock.advance(30.0)
            stage.actor.sweep(clock())
            assert stage.actor.is_idle()
            stage.actor.check_integrity()
    finally:
        backend.close()


async def test_a_slow_pull_keeps_its_leases_until_the_request_is_out_of_time() -> None:
    """Over a slow link a long prompt takes minutes, at every attempt anew."""
    backend, clock = CpuBackend(), FakeClock()
    try:
        async with running("gateway", "decode", "prefill") as (gateway, decode, server):
            stage = await stages.add_prefill(server, backend, clock=clock)
            to = Address(server.worker, "prefill")
            prompt = stages.tokens_as_bytes([1, 2, 3, 4, 5])
            await gateway.ask(to, Prefill(RequestId("r"), 1, prompt, 5, (), stages.sampling(9), 600.0), timeout_s=20)
            refs: list[KVRef] = []
            async with aclosing(
                decode.stream(to, PullKV(RequestId("r"), 1, stage.memory.layout, 600.0), timeout_s=20)
            ) as answers:
                async for answer in answers:
                    if isinstance(answer.message, KVChunk):
                        refs.append(answer.message.ref)
            clock.advance(590.0)
            stage.actor.sweep(clock())
            (ref,) = refs
            fetch = FetchBlocks("kv", ref.generation, ref.lease_id, ref.block_ids)
            assert len((await decode.ask(to, fetch, timeout_s=20)).buffers) == len(ref.block_ids) == 2
            clock.advance(10.0)
            stage.actor.sweep(clock())
            with pytest.raises(StaleHandle, match="has ended"):
                await decode.ask(to, fetch, timeout_s=20)
            assert stage.actor.is_idle()
            stage.actor.check_integrity()
    finally:
        backend.close()


async def test_what_was_handed_off_and_not_fetched_goes_with_its_asker() -> None:
    """The decode worker has left the handoff to itself, having lost the same gateway; nobody sends an Abort."""
    backend, clock = CpuBackend(), FakeClock()
    try:
        async with running("gateway", "decode", "prefill") as (gateway, decode, server):
            stage = await stages.add_prefill(server, backend, clock=clock)
            to = Address(server.worker, "prefill")
            prompt = stages.tokens_as_bytes([1, 2, 3, 4, 5])
            await gateway.ask(to, Prefill(RequestId("r"), 1, prompt, 5, (), stages.sampling(9), 600.0), timeout_s=20)
            message = PullKV(RequestId("r"), 1, stage.memory.layout, 300.0)
            async with aclosing(decode.stream(to, message, timeout_s=20)) as answers:
                assert [type(answer.message) async for answer in answers] == [KVChunk, Handoff]
            await until(lambda: not stage.actor._entries)
            stage.actor.sweep(clock())
            assert stage.actor.load().num_leases == 1
            await gateway.stop()
            await until(lambda: not stage.actor.load().num_leases)
            stage.actor.check_integrity()
    finally:
        backend.close()
