"""Which worker a piece of work goes to: where it delays everybody least, with what a worker has cached taken off.

Work is counted in seconds of its device, so that images and prompts add up where one worker has both stages, and a worker that is
twice as fast gets twice as much (`Speeds`). What delays: the work that waits there already, and the work itself, once for its own
request and once more where somebody decodes on the same device. So where every worker has every stage, images of one request
spread over devices that have nothing to do, and keep off those that stream. (Once for each who decodes there would be the sum of
all delays, and made first tokens later in a crowd: whoever had few streams was given all the work.)

A worker's load is this gateway's own outstanding work there, known exactly, plus what the worker's last report shows beyond
that: the work of other gateways. So a burst between two reports is spread. Of caches the gateway knows what it has caused itself:
an image was encoded there, a prompt prefilled or decoded there. A worker that has evicted it meanwhile only does the work.

Owns: outstanding work per worker and stage, and the memory of caches. Does not know: endpoints, requests, what time it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from epd.errors import InternalError, Unavailable
from epd.gateway.cache_memory import CacheMemory
from epd.gateway.speeds import Speeds
from protocol.messages import MMItem, StageLoad, WorkerId

_SIMILAR = 1.2  # decode loads within such a factor are as good as each other
_Rank = tuple[float, ...]


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
    amount: int  # tokens to encode or to prefill, blocks to decode in
    num_cached_tokens: int  # of an image or a prompt, that the worker is expected to have
    new_keys: tuple[Hashable, ...]  # that the worker will have in its cache afterwards


Own = tuple[Assignment, ...]
"""What has been placed of the request whose work is to be placed: it is not in its own way."""


@dataclass(slots=True, eq=False)
class _Stage:
    """One stage of one worker: its last report, this gateway's own work now, and how much of that there was at the report."""

    load: StageLoad
    token_s: float = 0.0  # of the device, to encode or prefill a token
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

    def estimate_requests(self) -> int:
        """Waiting or running."""
        return len(self.given) + max(0, self.load.num_running + self.load.num_waiting - self.reported_given)

    @property
    def queue_s(self) -> float:
        """Of the device, for what is to be encoded or prefilled."""
        return self.token_s * self.estimate(self.load.outstanding_tokens)


@dataclass(slots=True, eq=False)
class _Member:
    is_usable: bool = True
    stages: dict[str, _Stage] = field(default_factory=dict)

    def queue_s(self, but: Own) -> float:
        """Of the device, until it has encoded and prefilled all that it has been given, other than for one request."""
        own_s = sum(stage.token_s * own.amount for stage in self.stages.values() for own in stage.given.intersection(but))
        return sum(stage.queue_s for stage in self.stages.values()) - own_s

    def has_streams(self, but: Own) -> bool:
        """Somebody decodes on the device, or will when it is prefilled, other than one request."""
        stage = self.stages.get("decode")
        return stage is not None and stage.estimate_requests() > len(stage.given.intersection(but))


class Placement:
    """One per gateway. Work is placed, and counted, by `place_*` and ended by `end`.

    `avoid` names workers that have failed this work before: they are taken when nobody else is there. `together`: a request stays
    on the worker that prefills it, wherever that has the stage, as with engines that are not disaggregated.
    """

    def __init__(self, *, block_size: int, together: bool = False, max_images: int = 65_536, max_blocks: int = 262_144) -> None:
        self._block_size = block_size
        self._together = together
        self._members: dict[WorkerId, _Member] = {}
        self._speeds = Speeds()
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
                if stage.load is not loads[role]:  # a report that was seen before says nothing of what has been given since
                    stage.report(loads[role])
                self._speeds.report(view.worker, loads[role])
        for member_name, member in self._members.items():
            for role, stage in member.stages.items():
                stage.token_s = self._speeds.token_s(member_name, role)

    def forget(self, worker: WorkerId) -> None:
        """A worker has died: nothing goes there, nothing is cached there, and what it was given needs no end any more."""
        if self._members.pop(worker, None) is not None:
            self._speeds.forget(worker)
            for cache in self._caches.values():
                cache.forget(worker)

    def candidates(self, role: str) -> tuple[WorkerId, ...]:
        """Workers that may be given work of a role, in order of their names."""
        return tuple(sorted(worker for worker, member in self._members.items() if member.is_usable and role in member.stages))

    # --- decisions --------------------------------------------------------------------------------------------------

    def place_encode(self, item: MMItem, *, of: Own = (), avoid: Collection[WorkerId] = ()) -> Assignment:
        """Where the image has been encoded or is being encoded, else where that delays least.

        Args:
            of: the prefill and decode of the image's request. They wait for the image, not the image for them.

        Raises:
            Unavailable: there is no worker; the other two raise it too.
        """
        keys = (item.mm_hash,)
        holders = self._caches["encode"].longest(keys)
        prompt = next((own for own in of if own.role == "prefill"), None)
        near = prompt.worker if prompt is not None else None
        # Of its own prompt, what comes before the image is computed meanwhile; the rest waits for it.
        before_s = min(item.offset, prompt.amount) * self._speeds.token_s(prompt.worker, "prefill") if prompt is not None else 0.0

        def rank(worker: WorkerId, stage: _Stage) -> _Rank:
            if self._together and worker != near:
                return (2.0,)
            if worker in holders:
                return (0.0,)  # it does not queue behind others
            work_s = item.num_tokens * stage.token_s
            delay_s = self._delay_s(worker, work_s, but=of) + (before_s if worker == near else 0.0)
            # Of about equal ones the one where it is prefilled: that will be busy with this request anyway.
            return 1.0, round(delay_s / work_s, 1), worker != near, delay_s

        worker = self._best("encode", rank, avoid)
        if worker in holders:
            return self._assign("encode", worker, 0, item.num_tokens, keys, num_known=1)
        return self._assign("encode", worker, item.num_tokens, 0, keys)

    def place_prefill(self, hashes: Sequence[int], num_tokens: int, *, avoid: Collection[WorkerId] = ()) -> Assignment:
        """Where the prompt, but for what is cached of it, delays least."""
        holders = self._caches["prefill"].longest(hashes)

        def num_cached(worker: WorkerId) -> int:
            # The last token is always computed.
            return min(holders.get(worker, 0) * self._block_size, num_tokens - 1)

        def rank(worker: WorkerId, stage: _Stage) -> _Rank:
            delay_s = self._delay_s(worker, (num_tokens - num_cached(worker)) * stage.token_s)
            return (self._num_here(worker), delay_s) if self._together else (delay_s,)

        worker = self._best("prefill", rank, avoid)
        cached = num_cached(worker)
        return self._assign("prefill", worker, num_tokens - cached, cached, hashes, holders.get(worker, 0))

    def place_decode(
        self, hashes: Sequence[int], num_tokens: int, *, prompt: Assignment | None = None, avoid: Collection[WorkerId] = ()
    ) -> Assignment:
        """Where a step is shortest: few requests, few blocks in use. Workers without room for the prompt come last; of workers
        that are about as good, the one that has least to encode and to prefill.

        Args:
            prompt: where it is prefilled no block needs to travel, which is taken to cost as long as prefilling it.
        """
        holders = self._caches["decode"].longest(hashes)
        num_blocks = -(-(num_tokens + 1) // self._block_size)
        near, own = (prompt.worker, (prompt,)) if prompt is not None else (None, ())
        travel_s = prompt.amount * self._speeds.token_s(prompt.worker, "prefill") if prompt is not None else 0.0

        def rank(worker: WorkerId, stage: _Stage) -> _Rank:
            load = stage.load
            num_used = stage.estimate(load.num_blocks - load.num_free_blocks) + num_blocks - holders.get(worker, 0)
            # Before the first report nothing is known of the pool: as if it were empty.
            used_share = num_used / load.num_blocks if load.num_blocks else 0.0
            step = (stage.estimate_requests() + 1) * (1 + used_share)
            held_up_s = self._members[worker].queue_s(but=own) + (travel_s if worker != near else 0.0)
            return self._together and worker != near, used_share > 1, round(math.log(step, _SIMILAR)), held_up_s, step

        worker = self._best("decode", rank, avoid)
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

    def token_s(self, worker: WorkerId, role: str) -> float:
        """What a token takes there, in seconds of the device, as far as is known."""
        return self._speeds.token_s(worker, role)

    def num_given(self, worker: WorkerId, role: str) -> int:
        """Pieces of work that it has of this gateway, whether it has told of them yet or not."""
        return len(self._members[worker].stages[role].given)

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

    def _delay_s(self, worker: WorkerId, work_s: float, *, but: Own = ()) -> float:
        """Until work that begins now is done there, and what that costs the sequences that decode there."""
        member = self._members[worker]
        return member.queue_s(but) + work_s * (2 if member.has_streams(but) else 1)

    def _best(self, role: str, rank: Callable[[WorkerId, _Stage], _Rank], avoid: Collection[WorkerId]) -> WorkerId:
        candidates = self.candidates(role)
        if not candidates:
            raise Unavailable(f"no {role} worker is there to take this")

        def place(worker: WorkerId) -> tuple[bool, _Rank, int]:
            stage = self._members[worker].stages[role]
            # Equal ones take turns.
            return worker in avoid, rank(worker, stage), stage.num_ever

        return min(candidates, key=place)

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
