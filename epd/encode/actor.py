"""The encode stage: images in, embeddings out.

The I/O shell round `EncodeBatcher` and `EncoderCache`. Two streams work side by side: one turns image files into patches for the
next batch while the other runs the vision tower on this one.

Owns: who waits for which image, and the embedding pool's memory. Does not know: prompts, requests beyond their name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epd.cache.encoder_cache import Embedding, EncoderCache
from epd.clock import Clock
from epd.encode.batcher import EncodeBatcher, EncodeJob, Waiter
from epd.errors import BadImage, DeadlineExceeded, EpdError, InternalError
from epd.microkernel.actor import Mail, Reply
from epd.stage import StageActor, unexpected
from epd.step import ImageInput, VisionRunner
from epd.stream import on_stream
from epd.transfer.sender import Sender
from gpu.errors import DeviceFailed
from gpu.pool import Pool
from gpu.stream import Stream
from protocol.messages import Abort, EmbeddingRef, Encode, Encoded, LinkLoad, RequestId, Span, StageLoad, WorkerId

_Patches = Any  # of the runner's own kind, or an exception


@dataclass(frozen=True, slots=True)
class _Asked:
    reply: Reply
    at: float
    asker: WorkerId


@dataclass(frozen=True, slots=True)
class _Lease:
    """Of a handle that was given out."""

    epoch: int
    lease_id: int
    asker: WorkerId


class EncodeActor(StageActor):
    """One per encode worker."""

    role = "encode"

    def __init__(
        self,
        *,
        batcher: EncodeBatcher,
        cache: EncoderCache,
        memory: Pool,
        sender: Sender,
        runner: VisionRunner,
        stream: Stream,
        preprocess_stream: Stream,
        lease_s: float,
        clock: Clock,
    ) -> None:
        super().__init__(clock=clock)
        self._batcher = batcher
        self._cache = cache
        self._memory = memory
        self._sender = sender
        self._runner = runner
        self._stream = stream
        self._preprocess_stream = preprocess_stream
        self._lease_s = lease_s
        self._images: dict[str, bytes | memoryview] = {}  # of queued and running jobs, by mm_hash
        self._asked: dict[Waiter, list[_Asked]] = {}
        self._leases: dict[RequestId, list[_Lease]] = {}  # of handles given out; ended ones are swept
        self._askers: dict[WorkerId, Callable[[], None]] = {}  # that are watched, and what ends that
        self._running: asyncio.Task[None] | None = None

    # --- messages ---------------------------------------------------------------------------------------------------

    async def receive(self, mail: Mail) -> None:
        match mail.message:
            case Encode() as message:
                self._add(message, mail)
            case Abort(request_id=request_id, epoch=epoch):
                self._abort(request_id, epoch)
                self._release_leases(request_id, epoch)
            case _:
                if not self._sender.handle(mail, self):
                    raise unexpected(self, mail)
                self.wake()  # a released lease may have made room

    def _add(self, message: Encode, mail: Mail) -> None:
        self.refuse_if_draining()
        item, now = message.item, self.clock()
        embedding = self._cache.get(item.mm_hash)
        if embedding is not None:
            self._watch(mail.sender)
            mail.reply.send(self._encoded(message.request_id, message.epoch, mail.sender, embedding, ()))
            return
        if len(mail.buffers) != 1:
            raise InternalError(f"an image came in {len(mail.buffers)} buffers")
        if self._cache.num_blocks_of(item.num_tokens) > self._cache.num_blocks:
            raise BadImage(
                f"an image of {item.num_tokens} tokens is more than this server's embedding pool holds: send a smaller one"
            )
        job = self._batcher.add(message.request_id, message.epoch, item, now + message.deadline_s)
        self._images.setdefault(item.mm_hash, mail.buffers[0])
        self._asked.setdefault(job.waiters[-1], []).append(_Asked(mail.reply, now, mail.sender))
        self._watch(mail.sender)
        mail.reply.on_cancel(lambda: self._abort(message.request_id, message.epoch))
        self.wake()

    # --- steps ------------------------------------------------------------------------------------------------------

    async def step(self) -> bool:
        """Turn the next batch into patches, then start the vision tower on it as soon as the one before is done."""
        batch = self._batcher.next_batch(lambda item: self._cache.reserve(item.mm_hash, item.num_tokens) is not None)
        if not batch:
            return False
        picked_at = self.clock()
        patches: list[_Patches] = []
        for job in batch:
            item = job.item
            image = ImageInput(job.mm_hash, self._images[job.mm_hash], (item.grid_t, item.grid_h, item.grid_w), item.num_tokens)
            try:
                patches.append(await on_stream(self._preprocess_stream, self._runner.preprocess, image))
            except Exception as error:
                patches.append(error)
        if self._running is not None:
            await asyncio.wait([self._running])
        self._running = self.spawn(self._run(batch, patches, picked_at), name="encode step")
        return True

    async def _run(self, batch: Sequence[EncodeJob], patches: Sequence[_Patches], picked_at: float) -> None:
        started = self.clock()
        try:
            stored = await on_stream(self._stream, self._runner.encode_patches, patches, _grids(batch), self._reserved(batch))
        except DeviceFailed:
            raise  # no step will ever work again here: the stage ends, and its images are encoded elsewhere
        except Exception as error:
            self._log.error("an encode step failed", error=error, num_images=len(batch))
            stored = (error,) * len(batch)
        now = self.clock()
        self.stepped(started, sum(job.item.num_tokens for job in batch))
        for job, checksums in zip(batch, stored, strict=True):
            self._images.pop(job.mm_hash, None)
            waiters = self._batcher.finish(job.mm_hash)
            if isinstance(checksums, Exception):
                self._cache.fail(job.mm_hash)
                self._fail(waiters, checksums)
            else:
                embedding = self._cache.fill(job.mm_hash, checksums)
                self._answer(waiters, embedding, picked_at, started, now)
        self.wake()

    def _reserved(self, batch: Sequence[EncodeJob]) -> list[tuple[int, ...]]:
        return [self._cache.pending_blocks(job.mm_hash) for job in batch]

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, waiters: Sequence[Waiter], embedding: Embedding, picked_at: float, started: float, now: float) -> None:
        for waiter in waiters:
            for asked in self._asked.pop(waiter, ()):
                spans = (
                    Span("encode queue", 0.0, max(0.0, picked_at - asked.at)),
                    Span("preprocess", max(0.0, picked_at - asked.at), started - asked.at),
                    Span("encode", started - asked.at, now - asked.at),
                )
                if not asked.reply.cancelled:
                    told = self._encoded(waiter.request_id, waiter.epoch, asked.asker, embedding, self.counted(spans))
                    asked.reply.send(told)

    def _encoded(
        self, request_id: RequestId, epoch: int, asker: WorkerId, embedding: Embedding, spans: tuple[Span, ...]
    ) -> Encoded:
        """Every handle has a lease of its own: whoever gets it may fetch until it is released or expires."""
        pool = self._sender.pool
        lease_id = self._cache.lease(embedding.mm_hash, self.clock() + self._lease_s)
        self._leases.setdefault(request_id, []).append(_Lease(epoch, lease_id, asker))
        ref = EmbeddingRef(
            worker=pool.worker,
            generation=pool.generation,
            layout=pool.layout,
            lease_id=lease_id,
            mm_hash=embedding.mm_hash,
            num_tokens=embedding.num_tokens,
            block_ids=embedding.block_ids,
            checksums=embedding.checksums,
        )
        return Encoded(request_id, ref, spans)

    def _fail(self, waiters: Sequence[Waiter], error: Exception) -> None:
        answer = error if isinstance(error, EpdError) else InternalError(f"encoding failed: {error}")
        for waiter in waiters:
            for asked in self._asked.pop(waiter, ()):
                asked.reply.fail(answer)

    def _abort(self, request_id: RequestId, epoch: int) -> None:
        for waiter in self._batcher.abort(request_id, epoch):
            self._asked.pop(waiter, None)
        self._drop_images()

    def _release_leases(self, request_id: RequestId, epoch: int) -> None:
        """The request has ended: an answer that crossed its cancellation gave a lease to nobody."""
        for lease in self._leases.get(request_id, ()):
            if lease.epoch <= epoch:
                self._cache.release(lease.lease_id)
        self.wake()

    def _watch(self, asker: WorkerId) -> None:
        """What a gateway that dies has asked for, nobody will abort."""

        def lost(_: WorkerId) -> None:
            self._askers.pop(asker)()
            for lease in [lease for leases in self._leases.values() for lease in leases if lease.asker == asker]:
                self._cache.release(lease.lease_id)
            self.wake()

        if asker not in self._askers:
            self._askers[asker] = self.system.watch(asker, lost)

    def _forget_ended_leases(self) -> None:
        standing = {
            request_id: [lease for lease in leases if self._cache.has_lease(lease.lease_id)]
            for request_id, leases in self._leases.items()
        }
        self._leases = {request_id: leases for request_id, leases in standing.items() if leases}

    def _drop_images(self) -> None:
        """Forget the files of images that nobody waits for any more."""
        for mm_hash in [mm_hash for mm_hash in self._images if not self._batcher.has(mm_hash)]:
            del self._images[mm_hash]

    def sweep(self, now: float) -> None:
        for waiter in self._batcher.expire(now):
            for asked in self._asked.pop(waiter, ()):
                asked.reply.fail(DeadlineExceeded("the request ran out of time in encode"))
        self._drop_images()
        self._cache.expire(now)
        self._forget_ended_leases()

    async def stopped(self) -> None:
        for unwatch in self._askers.values():
            unwatch()
        self._runner.close()

    # --- what others see --------------------------------------------------------------------------------------------

    def load(self) -> StageLoad:
        return StageLoad(
            role=self.role,
            num_waiting=self._batcher.num_waiting,
            num_running=self._batcher.num_in_flight,
            outstanding_patches=self._batcher.outstanding_patches,
            outstanding_tokens=self._batcher.outstanding_tokens,
            num_blocks=self._cache.num_blocks,
            num_free_blocks=self._cache.num_free_blocks,
            num_leases=self._cache.num_leases,
            num_cached_blocks=self._cache.num_cached_blocks,
            cache_hits=self._cache.cache_hits,
            cache_queries=self._cache.cache_queries,
            is_idle_clean=self.is_clean,
            busy_s=self.busy_s,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_evictions=self._cache.num_evictions,
            spreads=self.spread.parts(),
        )

    def links(self) -> list[LinkLoad]:
        return []  # encode sends and never pulls

    def is_idle(self) -> bool:
        return self._batcher.is_idle() and self._cache.is_idle() and not self._asked and not self._images

    def check_integrity(self) -> None:
        self._batcher.check_integrity()
        self._cache.check_integrity()
        self._memory.check_integrity()


def _grids(batch: Sequence[EncodeJob]) -> list[tuple[int, int, int]]:
    return [(job.item.grid_t, job.item.grid_h, job.item.grid_w) for job in batch]
