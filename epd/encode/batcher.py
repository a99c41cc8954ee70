"""Which images the next encode step takes.

Images cannot be cut, so one huge image holds up everything that is behind it. Small ones may therefore pass larger ones, but not
for ever: an image that has been passed by as many patches as it has itself is due, and what is due goes first, in order of
arrival; others only fill up its steps. So a huge image waits for what came before it and about its own size more, and costs a
small one a step now and then.

Asks for one image are merged, also into a step that is under way: it is encoded once and all who asked get the answer.

Owns: the queue and who waits for which image. Does not know: bytes, blocks (`reserve` asks for them), messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from epd.errors import BadConfig, InternalError
from protocol.messages import MMItem, RequestId


@dataclass(frozen=True, slots=True)
class Waiter:
    """One ask for one image of one request."""

    request_id: RequestId
    epoch: int
    item: MMItem
    deadline: float  # on the clock that `now` is read from


@dataclass(slots=True, eq=False)
class EncodeJob:
    """One image and everybody who waits for it."""

    item: MMItem  # as the first one asked for it; others agree but for the offset
    num_patches: int
    order: int  # of arrival
    waiters: list[Waiter] = field(default_factory=list)
    num_passed_patches: int = 0  # that arrived later and went first
    is_in_flight: bool = False

    @property
    def mm_hash(self) -> str:
        return self.item.mm_hash

    @property
    def is_due(self) -> bool:
        return self.num_passed_patches >= self.num_patches


class EncodeBatcher:
    """A job leaves by `finish`, whichever way its step ended, or before its step when nobody waits for it any more."""

    def __init__(self, *, max_patches: int, max_images: int) -> None:
        if min(max_patches, max_images) < 1:
            raise BadConfig("encode limits must be at least 1")
        self._max_patches = max_patches
        self._max_images = max_images
        self._jobs: dict[str, EncodeJob] = {}  # by mm_hash: queued and in flight
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        return sum(not job.is_in_flight for job in self._jobs.values())

    @property
    def num_in_flight(self) -> int:
        return sum(job.is_in_flight for job in self._jobs.values())

    @property
    def outstanding_patches(self) -> int:
        return sum(job.num_patches for job in self._jobs.values())

    @property
    def outstanding_tokens(self) -> int:
        return sum(job.item.num_tokens for job in self._jobs.values())

    def has(self, mm_hash: str) -> bool:
        """Whether somebody waits for the image, or it is in flight."""
        return mm_hash in self._jobs

    def add(self, request_id: RequestId, epoch: int, item: MMItem, deadline: float) -> EncodeJob:
        """Ask for an image. Joins the job that is there for it, queued or in flight."""
        job = self._jobs.get(item.mm_hash)
        if job is None:
            job = EncodeJob(item, item.grid_t * item.grid_h * item.grid_w, self._num_added)
            self._num_added += 1
            self._jobs[item.mm_hash] = job
        job.waiters.append(Waiter(request_id, epoch, item, deadline))
        return job

    def next_batch(self, reserve: Callable[[MMItem], bool] | None = None) -> tuple[EncodeJob, ...]:
        """The images of the next step, at most `max_images` of `max_patches` patches together; a larger one goes alone.

        Args:
            reserve: takes room for an image's embedding. An image that it has no room for keeps its place in the queue.
        """
        batch: list[EncodeJob] = []
        num_patches = 0
        for job in self._in_turn():
            if len(batch) == self._max_images:
                break
            if batch and num_patches + job.num_patches > self._max_patches:
                continue
            if reserve is not None and not reserve(job.item):
                if job.is_due:
                    break  # or smaller images would take all room that becomes free
                continue
            job.is_in_flight = True
            batch.append(job)
            num_patches += job.num_patches
        self._count_passing(batch)
        return tuple(batch)

    def finish(self, mm_hash: str) -> tuple[Waiter, ...]:
        """A job of a batch has ended, well or not. Returns who still waits for it."""
        job = self._jobs.get(mm_hash)
        if job is None or not job.is_in_flight:
            raise InternalError(f"image {mm_hash} is not being encoded")
        del self._jobs[mm_hash]
        return tuple(job.waiters)

    def abort(self, request_id: RequestId, epoch: int | None = None) -> tuple[Waiter, ...]:
        """Forget all asks of a request, with `epoch` only up to that one; returns them. Steps in flight go on."""
        return self._drop(lambda waiter: waiter.request_id == request_id and (epoch is None or waiter.epoch <= epoch))

    def expire(self, now: float) -> tuple[Waiter, ...]:
        """Forget all asks whose deadline has passed; returns them."""
        return self._drop(lambda waiter: waiter.deadline <= now)

    def is_idle(self) -> bool:
        return not self._jobs

    def check_integrity(self) -> None:
        """Raises:
        InternalError: naming what is wrong.
        """
        for mm_hash, job in self._jobs.items():
            if job.mm_hash != mm_hash or any(waiter.item.mm_hash != mm_hash for waiter in job.waiters):
                raise InternalError(f"encode batcher: image {mm_hash} is filed under another hash")
            if not job.waiters and not job.is_in_flight:
                raise InternalError(f"encode batcher: nobody waits for queued image {mm_hash}")

    def _in_turn(self) -> list[EncodeJob]:
        queued = [job for job in self._jobs.values() if not job.is_in_flight]
        due = sorted((job for job in queued if job.is_due), key=lambda job: job.order)
        rest = sorted((job for job in queued if not job.is_due), key=lambda job: (job.num_patches, job.order))
        return due + rest

    def _count_passing(self, batch: Iterable[EncodeJob]) -> None:
        queued = [job for job in self._jobs.values() if not job.is_in_flight]
        for taken in batch:
            for job in queued:
                if job.order < taken.order:
                    job.num_passed_patches += taken.num_patches

    def _drop(self, is_dropped: Callable[[Waiter], bool]) -> tuple[Waiter, ...]:
        dropped: list[Waiter] = []
        for mm_hash, job in list(self._jobs.items()):
            leaving = [waiter for waiter in job.waiters if is_dropped(waiter)]
            if not leaving:
                continue
            dropped += leaving
            job.waiters = [waiter for waiter in job.waiters if not is_dropped(waiter)]
            if not job.waiters and not job.is_in_flight:
                del self._jobs[mm_hash]
        return tuple(dropped)
