"""The workers of this gateway's cluster: who is there, with what load, and which of them takes a piece of work.

An actor at the address "directory": workers join, report their load and leave; a lost link removes a worker at once. Choosing is
`Placement`'s; waiting until there is somebody to choose is done here.

Owns: the members. Knows: endpoints, roles, reports. Does not know: what a request is made of beyond its tokens and images.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from epd.cache.prefix import block_hashes
from epd.clock import Clock
from epd.errors import EpdError, InternalError, Refused, Unavailable
from epd.exposition import MemberLoad
from epd.gateway.observer import Observer
from epd.gateway.placement import Assignment, Placement, WorkerView
from epd.log import Log
from epd.microkernel.actor import Actor, Mail
from epd.request import GenerateRequest
from protocol.messages import Address, Endpoint, Join, Joined, Leave, MMItem, Part, ReportLoad, StageLoad, WorkerId

STAGES = ("encode", "prefill", "decode")
MAX_WAIT_FOR_WORKER_S = 30.0  # long enough for a worker that died to be started again
MAX_HASHED_BLOCKS = 4096  # of a prompt, for finding who has its prefix cached
_log = Log("fleet")
T = TypeVar("T")


@dataclass(slots=True)
class Member:
    """A worker that has joined."""

    join: Join
    joined_at: float
    load: MemberLoad
    unwatch: Callable[[], object]
    reported_at: float

    @property
    def endpoint(self) -> Endpoint:
        return self.join.endpoint


class Placed:
    """The workers of one attempt. `release` when it has ended, whichever way."""

    def __init__(
        self, placement: Placement, prefill: Endpoint, decode: Endpoint, assignments: tuple[Assignment, Assignment]
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self._placement = placement
        self.assignments = assignments
        self._of_prefill, self._of_decode = assignments

    def prefilled(self) -> None:
        """The prefill worker is done with it."""
        self._placement.end(self._of_prefill)

    def failed(self, role: str) -> None:
        """A stage has failed. Whichever it was, decode has not got what it was to have cached; prefill has what it computed."""
        self._placement.end(self._of_decode, failed=True)
        if role == "prefill":
            self._placement.end(self._of_prefill, failed=True)

    def release(self) -> None:
        for assignment in self.assignments:
            self._placement.end(assignment)


class Fleet(Actor):
    """`model` and `layout` are what a worker must serve to be let in. `needs_encode`: the model takes images."""

    def __init__(
        self,
        placement: Placement,
        *,
        model: str,
        layout: int,
        block_size: int,
        needs_encode: bool,
        clock: Clock,
        observer: Observer,
    ) -> None:
        super().__init__()
        self._placement = placement
        self._model = model
        self._layout = layout
        self._block_size = block_size
        self._roles = STAGES if needs_encode else STAGES[1:]
        self._clock = clock
        self._observer = observer
        observer.watch_roles(self._roles, self.missing_roles)
        self._members: dict[WorkerId, Member] = {}
        self._changed = asyncio.Event()

    async def stopped(self) -> None:
        for member in self._members.values():
            member.unwatch()

    # --- membership -------------------------------------------------------------------------------------------------

    async def receive(self, mail: Mail) -> None:
        match mail.message:
            case Join() as join:
                self._admit(join)
                mail.reply.send(Joined())
            case ReportLoad() as report:
                if not self._update(report):
                    self.spawn(self._send_away(mail.sender, report.worker), name="not a member")
            case Leave(worker=worker):
                self._remove(worker, "it has left", is_lost=False)
            case other:
                raise InternalError(f"the directory was sent {type(other).__name__}")

    def _admit(self, join: Join) -> None:
        worker = join.endpoint.worker
        if join.layout != self._layout:
            raise Refused(
                f"worker {worker} serves {join.model} with block size {join.block_size}, this cluster {self._model} with "
                f"{self._block_size}: start it with the same --model, --load-format and --block-size"
            )
        strange = next(
            (m for name, m in self._members.items() if name != worker and m.join.block_format != join.block_format), None
        )
        if strange is not None:
            raise Refused(
                f"worker {worker} on {join.device} has blocks in {join.block_format}, {strange.load.worker} on "
                f"{strange.join.device} in {strange.join.block_format}: the workers of one cluster need the same kind of --device"
            )
        now = self._clock()
        loads = tuple(StageLoad(role) for role in join.roles)
        known = self._members.get(worker)
        if known is not None:
            known.unwatch()
        unwatch: Callable[[], object] = _nothing
        if worker != self.address.worker:
            self.system.introduce(join.endpoint)
            unwatch = self.system.watch(worker, lambda lost: self._remove(lost, "its link is lost", is_lost=True))
        self._members[worker] = Member(join, now, MemberLoad(worker, loads), unwatch, reported_at=now)
        self._observer.joined(worker, join.roles)
        _log.info("worker joined", worker=worker, roles=",".join(join.roles))
        self._members_changed()

    async def _send_away(self, sender: WorkerId, worker: WorkerId) -> None:
        """It was removed and does not know: where both ends dial, one may see a link lost that the other saw replaced."""
        try:
            await self.system.tell(Address(sender, "membership"), Leave(worker), timeout_s=1.0)
        except EpdError:
            pass  # it will report again, or join

    def _update(self, report: ReportLoad) -> bool:
        """False: nobody of that name is a member."""
        member = self._members.get(report.worker)
        if member is None:
            return False
        member.load = MemberLoad(report.worker, report.stages, report.links, report.process, report.draining)
        member.reported_at = self._clock()
        self._members_changed()
        self._observer.reported(member.load)
        return True

    def _remove(self, worker: WorkerId, reason: str, *, is_lost: bool) -> None:
        member = self._members.pop(worker, None)
        if member is not None:
            member.unwatch()
            _log.info("worker is gone", worker=worker, reason=reason)
            self._placement.forget(worker)
            self._members_changed()
            self._observer.gone(worker, member.join.roles, is_lost=is_lost)

    def _members_changed(self) -> None:
        self._placement.update(
            WorkerView(worker, member.load.stages, is_draining=member.load.is_draining)
            for worker, member in self._members.items()
        )
        self._changed.set()
        self._changed = asyncio.Event()

    # --- choosing ---------------------------------------------------------------------------------------------------

    async def place(
        self, token_ids: tuple[int, ...], request: GenerateRequest, *, salt: str, avoid: frozenset[WorkerId], timeout_s: float
    ) -> Placed:
        """Choose a prefill and a decode worker; waits, within bounds, until there is one of each.

        Args:
            salt: what the stages will fold into the prompt's hashes: nobody is taken for what it has cached under another.

        Raises:
            Unavailable: nobody came.
        """
        prefix = np.asarray(token_ids[: MAX_HASHED_BLOCKS * self._block_size], dtype=np.int32)
        items = [image.item for image in request.images]
        hashes = block_hashes(prefix, items, self._block_size, salt)

        def choose() -> Placed:
            of_prefill = self._placement.place_prefill(hashes, len(token_ids), avoid=avoid)
            try:
                of_decode = self._placement.place_decode(hashes, len(token_ids), prompt=of_prefill, avoid=avoid)
            except Unavailable:
                self._placement.end(of_prefill, failed=True)
                raise
            prefill, decode = self._members[of_prefill.worker].endpoint, self._members[of_decode.worker].endpoint
            return Placed(self._placement, prefill, decode, (of_prefill, of_decode))

        return await self._when_possible(choose, timeout_s)

    @asynccontextmanager
    async def encoder(
        self, item: MMItem, placed: Placed, *, avoid: frozenset[WorkerId], timeout_s: float
    ) -> AsyncIterator[Endpoint]:
        """An encode worker for one image of a request that is placed so, counted as busy with it meanwhile."""
        place = partial(self._placement.place_encode, item, of=placed.assignments, avoid=avoid)
        assignment = await self._when_possible(place, timeout_s)
        failed = True
        try:
            yield self._members[assignment.worker].endpoint
            failed = False
        finally:
            self._placement.end(assignment, failed=failed)

    async def _when_possible(self, choose: Callable[[], T], timeout_s: float) -> T:
        deadline = self._clock() + min(timeout_s, MAX_WAIT_FOR_WORKER_S)
        while True:
            changed = self._changed
            try:
                return choose()
            except Unavailable:
                left = deadline - self._clock()
                if left <= 0:
                    raise
                try:
                    async with asyncio.timeout(left):
                        await changed.wait()
                except TimeoutError:
                    continue  # and fail with what is missing

    def max_model_len(self, at_most: int) -> int:
        """Longest prompt plus output that every prefill and decode worker takes."""
        lengths = [member.join.max_model_len for member in self._members.values() if member.join.roles != ("encode",)]
        return min([at_most, *lengths])

    def is_alive(self, worker: WorkerId) -> bool:
        return worker in self._members

    # --- what others see --------------------------------------------------------------------------------------------

    def missing_roles(self) -> tuple[str, ...]:
        """Roles that a request needs and nobody can be given work of."""
        return tuple(role for role in self._roles if not self._placement.candidates(role))

    def members(self) -> list[MemberLoad]:
        return [member.load for member in list(self._members.values())]  # the copy is for a caller on another thread

    def describe(self) -> dict[str, object]:
        """Topology, load and links as plain JSON values."""
        now = self._clock()
        return {"workers": [_describe(member, now, self._placement) for _, member in sorted(self._members.items())]}

    def check_integrity(self) -> None:
        self._placement.check_integrity()


def _nothing() -> None:
    """A worker of this process is not watched: it goes with us."""


def _describe(member: Member, now: float, placement: Placement) -> dict[str, object]:
    join, load = member.join, member.load
    stages = [
        describe_part(stage)
        | {
            "num_given": placement.num_given(load.worker, stage.role),
            "token_s": placement.token_s(load.worker, stage.role),
        }
        for stage in load.stages
    ]
    return {
        "worker": join.endpoint.worker,
        "roles": list(join.roles),
        "pid": join.pid,
        "device": join.device,
        "address": f"{join.endpoint.host}:{join.endpoint.port}",
        "is_draining": member.load.is_draining,
        "joined_s_ago": round(now - member.joined_at, 3),
        "reported_s_ago": round(now - member.reported_at, 3),
        "stages": stages,
        "links": [describe_part(link) for link in load.links],
        "process": None if load.process is None else describe_part(load.process),
    }


def describe_part(part: Part) -> dict[str, object]:
    """A part of a load report as plain JSON values, but for its spreads, which /metrics has."""
    return {name: getattr(part, name) for name in part.__struct_fields__ if name != "spreads"}
