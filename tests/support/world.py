"""A whole cluster in one event loop: a gateway and stage workers with checked runners, over real links.

`World` starts systems, lets the workers join, and runs journeys. At its end everything must be idle and whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from epd.clock import Clock, monotonic
from epd.gateway.attempt import Stages
from epd.gateway.fleet import Fleet
from epd.gateway.journey import Journey
from epd.gateway.observer import Observer
from epd.gateway.placement import Placement
from epd.gateway.router import TokenRouter
from epd.metrics import GatewayMetrics
from epd.microkernel.system import System
from epd.request import GenerateRequest, PromptImage
from epd.stage import StageActor
from gpu.cpu import CpuBackend
from protocol.messages import Address, Join, ReportLoad, RequestId, Sampling
from tests.support import stages
from tests.support.stages import BLOCK_SIZE, DecodeStage, EncodeStage, PrefillStage
from tests.support.systems import running, until

LAYOUT = 99
T = TypeVar("T")


@dataclass
class World:
    gateway: System
    systems: dict[str, System]
    fleet: Fleet
    router: TokenRouter
    clock: Clock
    observer: Observer
    encode: dict[str, EncodeStage] = field(default_factory=dict)
    prefill: dict[str, PrefillStage] = field(default_factory=dict)
    decode: dict[str, DecodeStage] = field(default_factory=dict)
    num_requests: int = 0

    def request(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        seed: int = 0,
        images: Sequence[bytes] = (),
        offsets: Sequence[int] = (),
        image_tokens: int = 3,
        deadline_s: float = 20.0,
    ) -> GenerateRequest:
        self.num_requests += 1
        items = [stages.item(data, offset, image_tokens) for data, offset in zip(images, offsets, strict=True)]
        return GenerateRequest(
            request_id=RequestId(f"r{self.num_requests}"),
            token_ids=tuple(prompt),
            images=tuple(PromptImage(item, data) for item, data in zip(items, images, strict=True)),
            sampling=Sampling(max_tokens=max_tokens, seed=seed),
            deadline_s=deadline_s,
        )

    def journey(self, request: GenerateRequest) -> Journey:
        parts = Stages(self.gateway, self.fleet, self.router, self.clock, self.observer)
        return Journey(request, 0, parts, deadline=self.clock() + request.deadline_s)

    async def run(self, request: GenerateRequest) -> list[int]:
        """All tokens of a request."""
        async with aclosing(self.journey(request).tokens()) as outputs:
            return [output.token.token_id async for output in outputs]

    @property
    def actors(self) -> list[StageActor]:
        return [
            *(stage.actor for stage in self.encode.values()),
            *(stage.actor for stage in self.prefill.values()),
            *(stage.actor for stage in self.decode.values()),
        ]

    async def settle(self) -> None:
        """Wait until nothing is left anywhere, then let every owner prove itself."""
        await until(lambda: all(actor.is_idle() for actor in self.actors) and not self.router.num_listeners)
        for actor in self.actors:
            actor.check_integrity()
        for prefill in self.prefill.values():
            assert prefill.blocks.is_idle()
        for decode in self.decode.values():
            assert decode.blocks.is_idle()
        self.fleet.check_integrity()

    async def lose(self, worker: str) -> None:
        """A worker dies."""
        await self.systems[worker].stop()
        self.encode.pop(worker, None)
        self.prefill.pop(worker, None)
        self.decode.pop(worker, None)
        await until(lambda: not self.fleet.is_alive(self.systems[worker].worker))


@asynccontextmanager
async def world(
    layout: dict[str, str],
    *,
    allowed: str = "auto",
    chunk: int = 8,
    decode_blocks: int = 32,
    prefill_blocks: int = 32,
    encode_blocks: int = 16,
    in_flight: int = 2,
    clock: Clock = monotonic,
) -> AsyncIterator[World]:
    """`layout`: worker -> its roles, comma-separated; "gateway" may have some. Prefill and decode of one worker share a pool."""
    backend = CpuBackend()
    names = ["gateway", *(name for name in layout if name != "gateway")]
    try:
        async with running(*names, introduced=False) as systems:
            by_name = dict(zip(names, systems, strict=True))
            observer = Observer(GatewayMetrics(), clock=clock)
            fleet = Fleet(
                Placement(block_size=BLOCK_SIZE),
                model="m",
                layout=LAYOUT,
                block_size=BLOCK_SIZE,
                needs_encode=True,
                clock=clock,
                observer=observer,
            )
            router = TokenRouter()
            await by_name["gateway"].register("directory", fleet)
            await by_name["gateway"].register("tokens", router)
            made = World(by_name["gateway"], by_name, fleet, router, clock, observer)
            sizes = _Sizes(allowed, chunk, decode_blocks, prefill_blocks, encode_blocks, in_flight)
            for name, roles in layout.items():
                await _add_worker(made, backend, name, roles.split(","), sizes)
            yield made
            await made.settle()
    finally:
        backend.close()


@dataclass(frozen=True)
class _Sizes:
    allowed: str
    chunk: int
    decode_blocks: int
    prefill_blocks: int
    encode_blocks: int
    in_flight: int


async def _add_worker(made: World, backend: CpuBackend, name: str, roles: list[str], sizes: _Sizes) -> None:
    system = made.systems[name]
    shared = stages.shared_pool(backend, num_blocks=sizes.prefill_blocks) if {"prefill", "decode"} <= set(roles) else None
    local = []
    if "encode" in roles:
        made.encode[name] = await stages.add_encode(system, backend, num_blocks=sizes.encode_blocks, clock=made.clock)
        local.append(made.encode[name].memory)
    if "prefill" in roles:
        made.prefill[name] = await stages.add_prefill(
            system,
            backend,
            num_blocks=sizes.prefill_blocks,
            chunk=sizes.chunk,
            budget=max(16, sizes.chunk),
            allowed=sizes.allowed,
            shared=shared,
            local=local,
            max_steps_in_flight=sizes.in_flight,
            clock=made.clock,
        )
    if "decode" in roles:
        made.decode[name] = await stages.add_decode(
            system,
            backend,
            num_blocks=sizes.decode_blocks,
            allowed=sizes.allowed,
            shared=shared,
            max_steps_in_flight=sizes.in_flight,
            clock=made.clock,
        )
    join = Join(
        endpoint=system.endpoint,
        roles=tuple(roles),
        model="m",
        layout=LAYOUT,
        pid=1,
        device="cpu",
        max_model_len=stages.MAX_LEN,
        block_size=BLOCK_SIZE,
    )
    system.introduce(made.gateway.endpoint)
    directory = Address(made.gateway.worker, "directory")
    await system.ask(directory, join, timeout_s=5.0)
    loads = tuple(actor.load() for actor in made.actors if actor.address.worker == system.worker)
    await system.tell(directory, ReportLoad(system.worker, loads, ()))


async def together(*work: Awaitable[T]) -> list[T]:
    """Run coroutines side by side, bounded."""
    async with asyncio.timeout(30):
        return list(await asyncio.gather(*work))
