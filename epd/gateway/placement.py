"""Which worker a piece of work goes to: least load, with what a worker has cached taken off.

A worker's load is this gateway's own outstanding work there, known exactly, plus what the worker's last report shows beyond
that: the work of other gateways. So a burst between two reports is spread. Of caches the gateway knows what it has caused itself:
an image was encoded there, a prompt prefilled or decoded there. A worker that has evicted it meanwhile only does the work.

Owns: outstanding work per worker and stage, and the memory of caches. Does not know: endpoints, requests, time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from epd.errors import InternalError, Unavailable
from epd.gateway.cache_memory import CacheMemory
from protocol.messages import MMItem, StageLoad, WorkerId


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as the directory shows it. A stage without a report yet has a StageLoad with nothing but its role."""

    worker: WorkerId
    stages: tuple[StageLoad, ...]
    is_alive: bool = True
    is_draining: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Work that counts against a worker until it is ended."""

    role: str
    worker: WorkerId
    amount: int  # patches to encode, tokens to prefill, blocks to decode in
    num_cached_tokens: int  # of an image or a prompt, that the worker is expected to have
    new_keys: tuple[Hashable, ...]  # that the worker will have in its cache afterwards


@dataclass(slots=True, eq=False)
class _Stage:
    """One stage of one worker: its last report, this gateway's own work now, and how much of that there was at the report."""

    load: StageLoad
    given: set[Assignment] = field(default_factory=set)
    amount: int = 0
    reported_given: int = 0
    reported_amount: int = 0
    num_ever: int = 0

    def report(self, load: StageLoad) -> None:
        self.load, self.reported_given, self.reported_amount = load, len(self.given), self.amount

    def estimate(self, reported: int) -> int:
        """Outstanding amount, where the report says `reported`."""
        return self.amount + max(0, reported - self.reported_amount)

    def estimate_requests(self, reported: int) -> int:
        return len(self.given) + max(0, reported - self.reported_given)


@dataclass(slots=True, eq=False)
class _Member:
    is_usable: bool = True
    stages: dict[str, _Stage] = field(default_factory=dict)


Cost = tuple[float, ...]


class Placement:
    """One per gateway. Work is placed, and counted, by `place_*` and ended by `end`.

    `avoid` names workers that have failed this work before: they are taken when nobody else is there. `together`: a request stays
    on the worker that prefills it, wherever that has the stage, as with engines that are not disaggregated.
    """

    def __init__(self, *, block_size: int, together: bool = False, max_images: int = 65_536, max_blocks: int = 262_144) -> None:
        self._block_size = block_size
        self._together = together
        self._members: dict[WorkerId, _Member] = {}
        self._caches = {"encode": CacheMemory(max_images), "prefill": CacheMemory(max_blocks), "decode": CacheMemory(max_blocks)}

    # --- the view ---------------------------------------------------------------------------------------------------

    def update(self, views: Iterable[WorkerView]) -> None:
        """Take the directory's view. A worker that is missing or dead loses its caches."""
        alive = {view.worker: view for view in views if view.is_alive}
        for worker in self._members.keys() - alive.keys():
            self.forget(worker)
        for view in alive.values():
            member = self._members.setdefault(view.worker, _Member())
            member.is_usable = not view.is_draining
            loads = {load.role: load for load in view.stages}
            member.stages = {role: member.stages.get(role) or _Stage(load) for role, load in loads.items()}
            for role, stage in member.stages.items():
                stage.report(loads[role])

    def forget(self, worker: WorkerId) -> None:
        """A worker has died: nothing goes there, nothing is cached there, and what it was given needs no end any more."""
        if self._members.pop(worker, None) is not None:
            for cache in self._caches.values():
                cache.forget(worker)

    def candidates(self, role: str) -> tuple[WorkerId, ...]:
        """Workers that may be given work of a role, in order of their names."""
        return tuple(sorted(worker for worker, member in self._members.items() if member.is_usable and role in member.stages))

    # --- decisions --------------------------------------------------------------------------------------------------

    def place_encode(self, item: MMItem, *, near: WorkerId | None = None, avoid: Collection[WorkerId] = ()) -> Assignment:
        """Where the image has been encoded or is being encoded, else where the fewest patches are outstanding.

        Args:
            near: where the request is prefilled.

        Raises:
            Unavailable: there is no worker; the other two raise it too.
        """
        keys = (item.mm_hash,)
        holders = self._caches["encode"].longest(keys)

        def cost(worker: WorkerId, stage: _Stage) -> Cost:
            if self._together and worker != near:
                return (2.0,)
            # An image that is there already does not queue behind others.
            return (0.0,) if worker in holders else (1.0, stage.estimate(stage.load.outstanding_patches))

        worker = self._cheapest("encode", cost, avoid)
        if worker in holders:
            return self._assign("encode", worker, 0, item.num_tokens, keys, num_known=1)
        return self._assign("encode", worker, item.grid_t * item.grid_h * item.grid_w, 0, keys)

    def place_prefill(self, hashes: Sequence[int], num_tokens: int, *, avoid: Collection[WorkerId] = ()) -> Assignment:
        """Where the prompt is computed first: after the outstanding tokens, its own that the worker has not cached."""
        holders = self._caches["prefill"].longest(hashes)

        def cost(worker: WorkerId, stage: _Stage) -> Cost:
            num_tokens_before = stage.estimate(stage.load.outstanding_tokens) - holders.get(worker, 0) * self._block_size
            return (self._num_here(worker), num_tokens_before) if self._together else (num_tokens_before,)

        worker = self._cheapest("prefill", cost, avoid)
        num_known = holders.get(worker, 0)
        # The last token is always computed.
        num_cached_tokens = min(num_known * self._block_size, num_tokens - 1)
        return self._assign("prefill", worker, num_tokens - num_cached_tokens, num_cached_tokens, hashes, num_known)

    def place_decode(
        self, hashes: Sequence[int], num_tokens: int, *, near: WorkerId | None = None, avoid: Collection[WorkerId] = ()
    ) -> Assignment:
        """Where a step is shortest: few requests, few blocks in use. Workers without room for the prompt come last.

        Args:
            near: taken where others are no better: from its prefill stage to its decode stage no block needs to travel.
        """
        holders = self._caches["decode"].longest(hashes)
        num_blocks = -(-(num_tokens + 1) // self._block_size)

        def cost(worker: WorkerId, stage: _Stage) -> Cost:
            load = stage.load
            num_requests = stage.estimate_requests(load.num_running + load.num_waiting)
            num_used = stage.estimate(load.num_blocks - load.num_free_blocks) + num_blocks - holders.get(worker, 0)
            # Before the first report nothing is known of the pool: as if it were empty.
            used_share = num_used / load.num_blocks if load.num_blocks else 0.0
            elsewhere = worker != near
            return self._together and elsewhere, used_share > 1, (num_requests + 1) * (1 + used_share), elsewhere

        worker = self._cheapest("decode", cost, avoid)
        num_known = holders.get(worker, 0)
        return self._assign("decode", worker, num_blocks - num_known, num_known * self._block_size, hashes, num_known)

    def end(self, assignment: Assignment, *, failed: bool = False) -> None:
        """The work is done or given up; a second time is no error. What failed is not expected in the worker's cache."""
        member = self._members.get(assignment.worker)
        stage = member.stages.get(assignment.role) if member is not None else None
        if stage is None or assignment not in stage.given:
            return
        stage.given.remove(assignment)
        stage.amount -= assignment.amount
        if failed:
            self._caches[assignment.role].drop(assignment.new_keys, assignment.worker)

    def num_outstanding(self, role: str) -> int:
        return sum(len(member.stages[role].given) for member in self._members.values() if role in member.stages)

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        for worker, member in self._members.items():
            for role, stage in member.stages.items():
                amount = sum(assignment.amount for assignment in stage.given)
                if amount != stage.amount:
                    raise InternalError(f"placement: {worker} has {amount} outstanding in {role}, {stage.amount} are counted")

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _num_here(self, worker: WorkerId) -> int:
        """Pieces of work that this worker has been given, in all of its stages."""
        return sum(len(stage.given) for stage in self._members[worker].stages.values())

    def _cheapest(self, role: str, cost: Callable[[WorkerId, _Stage], Cost], avoid: Collection[WorkerId]) -> WorkerId:
        candidates = self.candidates(role)
        if not candidates:
            raise Unavailable(f"no {role} worker is there to take this")

        def rank(worker: WorkerId) -> tuple[bool, Cost, int]:
            stage = self._members[worker].stages[role]
            # Equal ones take turns.
            return worker in avoid, cost(worker, stage), stage.num_ever

        return min(candidates, key=rank)

    def _assign(
        self, role: str, worker: WorkerId, amount: int, num_cached_tokens: int, keys: Sequence[Hashable], num_known: int = 0
    ) -> Assignment:
        assignment = Assignment(role, worker, amount, num_cached_tokens, tuple(keys[num_known:]))
        stage = self._members[worker].stages[role]
        stage.given.add(assignment)
        stage.amount += amount
        stage.num_ever += 1
        self._caches[role].remember(keys, worker)
        return assignment
