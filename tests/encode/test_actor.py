"""The encode stage with a vision tower that can be checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from epd.errors import BadImage, DeadlineExceeded, EpdError, Unavailable
from epd.microkernel.system import System
from epd.step import FloatArray
from gpu.cpu import CpuBackend
from gpu.errors import DeviceFailed
from protocol.messages import Abort, Address, Encode, Encoded, ReleaseLease, RequestId
from tests.support import stages
from tests.support.clock import FakeClock
from tests.support.stages import EncodeStage, embedding_of
from tests.support.systems import running, until


@dataclass
class _Bench:
    client: System
    stage: EncodeStage
    clock: FakeClock
    to: Address

    async def encode(self, data: bytes, num_tokens: int = 3, *, request: str = "r", deadline_s: float = 10) -> Encoded:
        message = Encode(RequestId(request), 1, stages.item(data, 0, num_tokens), deadline_s)
        answer = await self.client.ask(self.to, message, (data,), timeout_s=20)
        assert isinstance(answer.message, Encoded)
        return answer.message

    def rows(self, encoded: Encoded) -> FloatArray:
        blocks = self.stage.memory.array(np.float32, (stages.ROWS, stages.WIDTH)).view(np.float32)
        return blocks[list(encoded.ref.block_ids)].reshape(-1, stages.WIDTH)[: encoded.ref.num_tokens]

    async def idle(self) -> None:
        await until(self.stage.actor.is_idle)
        self.stage.actor.check_integrity()


@asynccontextmanager
async def _bench(*, num_blocks: int = 16) -> AsyncIterator[_Bench]:
    backend = CpuBackend()
    clock = FakeClock()
    try:
        async with running("client", "encode") as (client, server):
            stage = await stages.add_encode(server, backend, num_blocks=num_blocks, clock=clock)
            yield _Bench(client, stage, clock, Address(server.worker, "encode"))
    finally:
        backend.close()


async def test_rows_lie_in_the_pool_under_a_lease_with_their_checksums() -> None:
    async with _bench() as bench:
        encoded = await bench.encode(b"one", 5)
        assert (bench.rows(encoded) == embedding_of(b"one", 5)).all()
        assert list(encoded.ref.checksums) == bench.stage.memory.checksum(encoded.ref.block_ids)
        assert not bench.stage.actor.is_idle()
        await bench.client.tell(bench.to, ReleaseLease(encoded.ref.lease_id))
        await bench.idle()


async def test_an_image_is_encoded_once_however_often_it_is_asked_for() -> None:
    async with _bench() as bench:
        bench.stage.runner.gate.clear()
        asks = [asyncio.create_task(bench.encode(b"same", request=f"r{number}")) for number in range(4)]
        await until(lambda: len(bench.stage.actor._asked) == 4)
        bench.stage.runner.gate.set()
        answers = await asyncio.gather(*asks)
        again = await bench.encode(b"same")
        assert bench.stage.runner.num_encoded == 1
        assert bench.stage.actor.load().cache_hits == 1
        leases = {answer.ref.lease_id for answer in [*answers, again]}
        assert len(leases) == 5  # every handle has its own
        for lease_id in leases:
            await bench.client.tell(bench.to, ReleaseLease(lease_id))
        await bench.idle()


async def test_a_broken_image_fails_alone() -> None:
    async with _bench() as bench:
        results = await asyncio.gather(bench.encode(b"broken"), bench.encode(b"fine", request="s"), return_exceptions=True)
        assert isinstance(results[0], BadImage)
        assert isinstance(results[1], Encoded)


async def test_an_image_larger_than_the_pool_is_refused() -> None:
    async with _bench(num_blocks=2) as bench:
        with pytest.raises(BadImage, match="embedding pool"):
            await bench.encode(b"huge", 5)
        await bench.idle()


async def test_without_room_an_image_waits_for_leases_to_end() -> None:
    async with _bench(num_blocks=2) as bench:
        first = await bench.encode(b"first", 4)
        second = asyncio.create_task(bench.encode(b"second", 4, request="s"))
        await until(lambda: bench.stage.actor.load().num_waiting == 1)
        assert not second.done()
        await bench.client.tell(bench.to, ReleaseLease(first.ref.lease_id))
        assert (bench.rows(await second) == embedding_of(b"second", 4)).all()


async def test_leases_expire() -> None:
    async with _bench() as bench:
        await bench.encode(b"one")
        bench.clock.advance(21)
        await bench.idle()


async def test_what_a_gateway_had_asked_for_goes_with_it() -> None:
    """Handles that it was given, new and cached ones; what others were given stays."""
    async with _bench() as bench, running("other") as (other,):
        await bench.encode(b"one")
        await bench.encode(b"one", request="s")
        other.introduce(bench.stage.actor.system.endpoint)
        message = Encode(RequestId("t"), 1, stages.item(b"one", 0, 3), 10.0)
        await other.ask(bench.to, message, (b"one",), timeout_s=20)
        assert bench.stage.actor.load().num_leases == 3
        await bench.client.stop()
        await until(lambda: bench.stage.actor.load().num_leases == 1)
        await other.stop()
        await bench.idle()


@pytest.mark.parametrize("how", ["abort", "leave", "deadline"])
async def test_what_nobody_waits_for_is_forgotten(how: str) -> None:
    async with _bench() as bench:
        bench.stage.runner.gate.clear()
        running_ask = asyncio.create_task(bench.encode(b"first"))
        await until(lambda: bench.stage.actor.load().num_running == 1)
        asks = [
            asyncio.create_task(bench.encode(bytes([65 + number]) * 9, 2, request="gone", deadline_s=5)) for number in range(3)
        ]
        await until(lambda: len(bench.stage.actor._images) == 4)
        match how:
            case "abort":
                await bench.client.tell(bench.to, Abort(RequestId("gone"), 1))
                await until(lambda: len(bench.stage.actor._asked) == 1)
                for ask in asks:
                    ask.cancel()
            case "leave":
                for ask in asks:
                    ask.cancel()
            case _:
                bench.clock.advance(6)
                bench.stage.actor.sweep(bench.clock())
                results = await asyncio.gather(*asks, return_exceptions=True)
                assert all(isinstance(result, DeadlineExceeded) for result in results)
        await asyncio.wait(asks)
        bench.stage.runner.gate.set()
        encoded = await running_ask
        await bench.client.tell(bench.to, ReleaseLease(encoded.ref.lease_id))
        await bench.idle()


async def test_a_leaving_worker_refuses_what_another_can_do() -> None:
    async with _bench() as bench:
        bench.stage.actor.is_draining = True
        with pytest.raises(Unavailable):
            await bench.encode(b"one")


async def test_a_crashing_tower_fails_the_images_and_not_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _bench() as bench:

        def crash(*_: object) -> None:
            raise ValueError("out of luck")

        with monkeypatch.context() as patched:
            patched.setattr(bench.stage.runner, "encode_patches", crash)
            with pytest.raises(EpdError, match="out of luck"):
                await bench.encode(b"one")
        assert (bench.rows(await bench.encode(b"one")) == embedding_of(b"one", 3)).all()


async def test_a_device_that_fails_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _bench() as bench:

        def fail(*_: object) -> None:
            raise DeviceFailed("an illegal address")

        monkeypatch.setattr(bench.stage.runner, "encode_patches", fail)
        with pytest.raises(EpdError) as caught:
            await bench.encode(b"one")
        assert caught.value.retryable
        with pytest.raises(EpdError) as caught:
            await bench.encode(b"two", request="s")
        assert caught.value.retryable
