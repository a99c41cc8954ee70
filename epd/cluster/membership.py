"""A worker's side of the cluster: joins its gateways, tells them its load, leaves when drained.

Owns: where this worker is a member. Knows: the stage actors of this process, to ask them for their load. Joins again by itself
whenever a gateway was lost, so that it does not matter who starts first or who is restarted. Gateways know nothing of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from epd.errors import BadConfig, EpdError, InternalError, PeerLost, Refused
from epd.log import Log
from epd.microkernel.actor import Actor, Mail
from epd.microkernel.pulse import Pulse
from epd.stage import StageActor
from epd.trust import doubts, since
from gpu.utilisation import Meter, Usage
from protocol.messages import Address, Drain, Join, Leave, ProcessLoad, ReportLoad, WorkerId

REPORT_S = 0.2
MEASURE_S = 1.0
_WARN_S = 10.0
JOIN_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
_log = Log("membership")


FindGateway = Callable[[], Awaitable[WorkerId]]


@dataclass(slots=True, eq=False)
class _Gateway:
    """What this worker has to do with one gateway. `find` tells its worker id once it is there."""

    find: FindGateway
    directory: Address | None = None  # where this worker has joined last
    is_joined: bool = False
    report_now: asyncio.Event = field(default_factory=asyncio.Event)


class Membership(Actor):
    """One per process that hosts stages. `gateways` find one each, `meter` tells what the process uses; `on_joined` is called at
    the first join, `on_refused` when joining can never succeed, `on_drain` when the cluster asks this worker to leave.
    """

    def __init__(
        self,
        gateways: Sequence[FindGateway],
        join: Join,
        stages: Sequence[StageActor],
        *,
        meter: Meter,
        pulse: Pulse,
        on_joined: Callable[[], None],
        on_refused: Callable[[EpdError], None],
        on_drain: Callable[[], None],
    ) -> None:
        super().__init__()
        self._gateways = [_Gateway(find) for find in gateways]
        self._join = join
        self._stages = stages
        self._meter = meter
        self._pulse = pulse
        self._warned_at: ProcessLoad | None = None  # what was true when doubts were last looked for
        self._process: ProcessLoad | None = None
        self._on_joined = on_joined
        self._on_refused = on_refused
        self._on_drain = on_drain
        self._was_member = False
        self._has_left = False

    async def started(self) -> None:
        for gateway in self._gateways:
            self.spawn(self._stay(gateway), name="membership")
        self.spawn(self._measure(), name="usage of the process")

    async def stopped(self) -> None:
        self._meter.close()

    async def receive(self, mail: Mail) -> None:
        match mail.message:
            case Drain():
                self._on_drain()
            case Leave():
                for gateway in self._gateways:
                    if gateway.directory is not None and gateway.directory.worker == mail.sender:
                        gateway.is_joined = False
                        gateway.report_now.set()
            case other:
                raise InternalError(f"membership was sent {type(other).__name__}")

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, say so, and wait until nothing is left; after the time-out what is left is lost to other workers."""
        for stage in self._stages:
            stage.is_draining = True
        for gateway in self._gateways:
            gateway.report_now.set()
        try:
            async with asyncio.timeout(timeout_s):
                for stage in self._stages:
                    await stage.idle()
        except TimeoutError:
            _log.warning("requests move elsewhere", worker=self._join.endpoint.worker)
            for stage in self._stages:
                await stage.evacuate()
        self._has_left = True
        await asyncio.gather(*map(self._leave, self._gateways))

    async def _leave(self, gateway: _Gateway) -> None:
        if gateway.directory is not None:
            try:
                await self.system.tell(gateway.directory, Leave(self._join.endpoint.worker), timeout_s=1.0)
            except EpdError:
                pass  # the gateway has gone first

    async def _stay(self, gateway: _Gateway) -> None:
        """Join, report until the gateway is lost, join again."""
        backoff_s = FIRST_BACKOFF_S
        is_told = False
        while not self._has_left:
            try:
                directory = Address(await gateway.find(), "directory")
                await self._join_at(gateway, directory)
            except (Refused, BadConfig) as error:
                self._on_refused(error)
                return
            except EpdError as error:
                if backoff_s == MAX_BACKOFF_S and not is_told:  # a gateway that starts, restarts or stops with us is no news
                    _log.warning("cannot join, trying on", reason=error.message)
                    is_told = True
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
                continue
            backoff_s = FIRST_BACKOFF_S
            is_told = False
            gateway.directory = directory
            if not self._was_member:
                self._was_member = True
                self._on_joined()
            await self._report(gateway, directory)

    async def _join_at(self, gateway: _Gateway, directory: Address) -> None:
        """With the link that is there from now on, the gateway forgets this worker."""

        def lost(_: WorkerId) -> None:
            unwatch()
            gateway.is_joined = False
            gateway.report_now.set()

        gateway.is_joined = True
        unwatch = self.system.watch(directory.worker, lost)
        try:
            await self.system.ask(directory, self._join, timeout_s=JOIN_TIMEOUT_S)
        except BaseException:
            unwatch()
            raise

    async def _report(self, gateway: _Gateway, directory: Address) -> None:
        while gateway.is_joined and not self._has_left:
            links = tuple(link for stage in self._stages for link in stage.links())
            report = ReportLoad(
                worker=self._join.endpoint.worker,
                stages=tuple(stage.load() for stage in self._stages),
                links=links,
                draining=any(stage.is_draining for stage in self._stages),
                process=self._process,
            )
            try:
                await self.system.tell(directory, report)
            except PeerLost as error:
                _log.debug("lost the gateway", reason=error.message)
                return
            except EpdError:
                pass  # a busy gateway misses one report
            gateway.report_now.clear()
            try:
                # Not wait_for(): in Python 3.11 that one forgets a cancellation that comes together with the event.
                async with asyncio.timeout(REPORT_S):
                    await gateway.report_now.wait()
            except TimeoutError:
                pass

    async def _measure(self) -> None:
        while True:
            # On a thread: a driver may take its time.
            self._process = _process_load(await asyncio.to_thread(self._meter.read), self._pulse.lag_s())
            self._warn(self._process)
            await asyncio.sleep(MEASURE_S)

    def _warn(self, process: ProcessLoad) -> None:
        """Say when the host is too slow for its emulated device, every ten seconds of the device's work at most."""
        busy_s, _ = since(self._warned_at, process)
        if busy_s >= _WARN_S:
            if found := doubts(self._join.endpoint.worker, process, self._warned_at):
                _log.warning("this host is too slow to be believed", reasons="; ".join(found))
            self._warned_at = process


def _process_load(usage: Usage, loop_lag_s: float) -> ProcessLoad:
    def known(value: float | None) -> float:
        return -1 if value is None else value

    device, host_busy = usage.device, known(usage.host_busy)
    if device is None:
        return ProcessLoad(usage.cpu_s, usage.rss_bytes, loop_lag_s=loop_lag_s, host_busy=host_busy)

    return ProcessLoad(
        cpu_s=usage.cpu_s,
        rss_bytes=usage.rss_bytes,
        device_name=device.name,
        utilisation=known(device.utilisation),
        memory_used_bytes=int(known(device.memory_used_bytes)),
        memory_total_bytes=int(known(device.memory_total_bytes)),
        power_w=known(device.power_w),
        device_busy_s=known(device.busy_s),
        device_late_s=known(device.late_s),
        loop_lag_s=loop_lag_s,
        host_busy=host_busy,
    )
