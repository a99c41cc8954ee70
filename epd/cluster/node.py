"""One process of a cluster: the stages and the gateway that it hosts, from start to stop.

Owns: the microkernel of this process and everything that runs on it. Knows: the order in which things start and stop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from epd.clock import monotonic
from epd.cluster.fingerprint import fingerprint
from epd.cluster.membership import FindGateway, Membership
from epd.config import ServeConfig
from epd.errors import BadConfig, EpdError, InternalError
from epd.gateway.admission import Admission
from epd.gateway.attempt import Stages
from epd.gateway.fleet import Fleet
from epd.gateway.observer import Observer
from epd.gateway.placement import Placement
from epd.gateway.prompt import Prompter
from epd.gateway.router import TokenRouter
from epd.gateway.service import Gateway
from epd.http.app import HttpServer
from epd.log import Log
from epd.metrics import GatewayMetrics, Slo
from epd.microkernel.actor import Actor
from epd.microkernel.pulse import Pulse
from epd.microkernel.system import System
from epd.model.config import ModelConfig, load_model_config
from epd.model.loader import resolve_model
from epd.stage import StageActor
from epd.tracing import Tracer, open_tracer
from protocol.messages import Join, WorkerId

if TYPE_CHECKING:
    from epd.cluster.build import StageParts

FIND_TIMEOUT_S = 5.0
CRASH_GRACE_S = 2.0  # for this gateway's requests to be answered with what ended them, when they have tried again in vain
_log = Log("node")


@dataclass(slots=True)
class _Front:
    """The gateway of this process, if it hosts one."""

    http: HttpServer
    fleet: Fleet
    router: TokenRouter
    admission: Admission
    tracer: Tracer | None

    def check_integrity(self) -> None:
        self.fleet.check_integrity()
        self.admission.check_integrity()
        if not self.admission.is_idle() or self.router.num_listeners:
            raise InternalError(
                f"the gateway still has {self.admission.num_running} choices, {self.router.num_listeners} listeners"
            )


class Node:
    """`report` hears of progress while loading, `on_ready` once: with the endpoint's URL, or how long it took to join."""

    def __init__(self, config: ServeConfig, *, report: Callable[[str], None], on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._report = report
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._error: EpdError | None = None
        self._has_crashed = False
        self._on_crash: Callable[[], None] = _nothing  # ends a drain that is under way
        self._url = ""
        self._started = time.monotonic()
        name = config.link.worker or f"{'-'.join(config.roles)}-{secrets.token_hex(3)}"
        self._worker = WorkerId(name)
        self.system: System | None = None  # from `run` on
        self.stages: tuple[StageActor, ...] = ()  # once they are registered
        self.takes_images = False  # the model does; known from `on_ready` on
        self._front: _Front | None = None

    def stop(self) -> None:
        """Drain and end `run`."""
        self._stop.set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            EpdError: it could not start, the cluster does not take it in, or a stage has crashed.
        """
        config = self._config
        folder, model = await asyncio.to_thread(self._read_model)
        self.takes_images = model.vision is not None
        parts = await self._load_unless_stopped(folder, model)
        system = self.system = System(
            worker=self._worker,
            token=config.link.token,
            roles=config.roles,
            host=config.link.host,
            port=config.link.port,
            advertise_host=config.link.advertise_host,
            unix=config.link.transfer != "socket",  # as between hosts, where only TCP leads
        )
        membership: Membership | None = None
        try:
            await self._listen(system)
            mark = fingerprint(config, folder, model)
            pulse = Pulse()
            await self._register(system, "pulse", pulse)
            if "gateway" in config.roles:
                self._front = await self._start_front(system, folder, model, mark, pulse)
            if parts is not None:
                membership = await self._start_stages(system, parts, mark, pulse)
            await self._stop.wait()
        finally:
            try:
                await self._wind_down(system, self._front, membership)
            finally:
                if parts is not None:
                    parts.close()
        if self._error is not None:
            raise self._error

    def check_integrity(self) -> None:
        """At idle nothing is held for any request, by any part of this process.

        Raises:
            InternalError: something is; says what.
        """
        for stage in self.stages:
            stage.check_integrity()
            load = stage.load()
            if not stage.is_idle() or load.num_leases or load.num_free_blocks != load.num_blocks:
                raise InternalError(f"the {stage.role} stage is not idle: {load}")
        if self._front is not None:
            self._front.check_integrity()
        if self.system is not None:
            self.system.check_integrity()

    # --- start ------------------------------------------------------------------------------------------------------

    def _read_model(self) -> tuple[Path, ModelConfig]:
        config = self._config
        is_light = config.load_format == "dummy" or config.device.startswith("emulated:") or config.roles == ("gateway",)
        folder = resolve_model(config.model, weights=not is_light)
        return folder, load_model_config(folder)

    async def _load_unless_stopped(self, folder: Path, model: ModelConfig) -> StageParts | None:
        if self._config.roles == ("gateway",):
            return None
        from epd.cluster.build import load  # brings numba and, in time, torch; a gateway needs neither

        return await asyncio.to_thread(load, self._config, folder, model, self._report)

    async def _listen(self, system: System) -> None:
        try:
            await system.start()
        except OSError as error:
            link = self._config.link
            raise BadConfig(
                f"cannot listen for workers on {link.host}:{link.port} ({error.strerror}): choose another --cluster-port"
            ) from error

    async def _start_front(self, system: System, folder: Path, model: ModelConfig, mark: int, pulse: Pulse) -> _Front:
        config, clock = self._config, monotonic
        longest = min(config.engine.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
        prompter = Prompter.from_folder(folder, model, max_model_len=lambda: fleet.max_model_len(longest))
        slo = Slo(ttft_s=config.observe.slo_ttft_s, tpot_s=config.observe.slo_tpot_s)
        tracer = open_tracer(config.observe.otlp_endpoint, model=config.model_name) if config.observe.otlp_endpoint else None
        observer = Observer(GatewayMetrics(slo), clock=clock, trace=tracer)
        fleet = Fleet(
            Placement(block_size=config.engine.block_size, together=config.placement == "together"),
            model=config.model,
            layout=mark,
            block_size=config.engine.block_size,
            needs_encode=model.vision is not None,
            clock=clock,
            observer=observer,
        )
        router = TokenRouter()
        await self._register(system, "directory", fleet)
        await self._register(system, "tokens", router)
        limits = config.admission
        admission = Admission(max_requests=limits.max_requests, max_prompt_tokens=limits.max_prompt_tokens)
        gateway = Gateway(
            model_name=config.model_name,
            tokenizer=prompter.tokenizer,
            stages=Stages(system, fleet, router, clock, observer),
            admission=admission,
            loop_lag_s=pulse.lag_s,
        )
        http = HttpServer(config.http, gateway, prompter, request_timeout_s=limits.request_timeout_s)
        await http.start()
        self._url = http.url
        if config.roles == ("gateway",):
            self._on_ready(http.url)
        return _Front(http, fleet, router, admission, tracer)

    async def _start_stages(self, system: System, parts: StageParts, mark: int, pulse: Pulse) -> Membership:
        config = self._config
        actors = parts.actors(system, monotonic)
        self.stages = tuple(actors)
        for actor in actors:
            await self._register(system, actor.role, actor)
        join = Join(
            endpoint=system.endpoint,
            roles=tuple(actor.role for actor in actors),
            model=config.model,
            layout=mark,
            pid=os.getpid(),
            device=config.device,
            max_model_len=parts.sizes.max_model_len,
            block_size=config.engine.block_size,
            block_format=parts.stack.backend.block_format,
        )
        membership = Membership(
            self._gateways(system),
            join,
            actors,
            meter=parts.stack.open_meter(),
            pulse=pulse,
            on_joined=self._joined,
            on_refused=self._refused,
            on_drain=self.stop,
        )
        await self._register(system, "membership", membership)
        return membership

    def _gateways(self, system: System) -> list[FindGateway]:
        async def find(host: str, port: int) -> WorkerId:
            return (await system.discover(host, port, timeout_s=FIND_TIMEOUT_S)).worker

        async def find_own() -> WorkerId:
            return self._worker

        return [partial(find, *address) for address in self._config.link.join] or [find_own]

    def _joined(self) -> None:
        self._on_ready(self._url or f"{time.monotonic() - self._started:.1f} s")

    # --- end --------------------------------------------------------------------------------------------------------

    def _refused(self, error: EpdError) -> None:
        self._error = error
        self._stop.set()

    async def _register(self, system: System, name: str, actor: Actor) -> None:
        await system.register(name, actor, on_crash=partial(self._crashed, name))

    def _crashed(self, name: str, error: Exception) -> None:
        """Who has lost its state cannot go on, nor can those who need it; whoever supervises the process starts it afresh."""
        _log.error("an actor crashed", name=name, error=error)
        self._error = self._error or InternalError(f"the actor {name!r} crashed: {type(error).__name__}: {error}")
        self._has_crashed = True
        self._stop.set()
        self._on_crash()

    async def _wind_down(self, system: System, front: _Front | None, membership: Membership | None) -> None:
        """First no new requests, then none running, then no links."""
        try:
            await self._drain(front, membership)
        finally:
            if front is not None:
                await front.http.stop()
            await system.stop()
            if front is not None and front.tracer is not None:
                await asyncio.to_thread(front.tracer.close)

    async def _drain(self, front: _Front | None, membership: Membership | None) -> None:
        """Take nothing new and let what runs finish, unless a stage has crashed.

        All requests of a crashed stage have been answered already, and it will never be idle. The other stages use its device
        and are not waited for: their end answers what they hold, peers see the link go, and it is tried again elsewhere.
        """
        timeout_s = self._config.admission.drain_timeout_s
        if front is not None:
            async with self._until_crash(CRASH_GRACE_S):
                await front.http.drain(timeout_s)
        if membership is not None and not self._has_crashed:
            async with self._until_crash(0.0):
                await membership.drain(0.0 if front is not None else timeout_s)

    @asynccontextmanager
    async def _until_crash(self, grace_s: float) -> AsyncIterator[None]:
        """What is waited for within is given up so long after a crash, whenever that comes."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as bound:
                self._on_crash = lambda: bound.reschedule(loop.time() + grace_s)
                if self._has_crashed:
                    self._on_crash()
                yield
        except TimeoutError:
            pass
        finally:
            self._on_crash = _nothing


def _nothing() -> None:
    """Nothing is being drained."""
