"""The giving end of a KV handoff: runs of finished blocks go to the decode worker that pulls them, then the first token.

Each run travels as a `KVRef` under a lease of its own, so that prefill may forget the request as soon as everything was told: the
leases keep the blocks until they have been copied, or the request is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from epd.cache.block_pool import BlockPool
from epd.clock import Clock
from epd.errors import EpdError, StaleHandle
from epd.microkernel.actor import Mail, Reply
from epd.prefill.request import FinishedBlocks, PrefillRequest
from epd.stream import on_stream
from epd.transfer.sender import Sender
from gpu.pool import Pool
from gpu.stream import Stream
from protocol.messages import Handoff, KVChunk, KVRef, PullKV, RequestId, Token

_PARKED_S = 5.0  # that a pull may be ahead of its prompt
_Event = tuple[FinishedBlocks, int] | Token | EpdError


class KVHandoff:
    """One request's. `add` and `end` are called as blocks finish; `run` sends."""

    def __init__(
        self,
        request: PrefillRequest,
        reply: Reply,
        *,
        sender: Sender,
        blocks: BlockPool,
        memory: Pool,
        stream: Stream,
        is_local: bool,
    ) -> None:
        self._request = request
        self._reply = reply
        self._sender = sender
        self._blocks = blocks
        self._memory = memory
        self._stream = stream
        self._is_local = is_local
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._leases: list[int] = []
        self._is_released = False

    def add(self, finished: FinishedBlocks) -> None:
        """These blocks are complete and will not change any more."""
        if self._is_released:
            return  # nobody pulls any more, and the request has not been aborted yet
        # Leased now and not when sent: the request may be aborted in between, and its blocks become somebody else's.
        # And for as long as the request may take: a link may need longer for a long prompt than any one length of a lease, and
        # then so it does at the next attempt. The puller releases what it has; a request that ends otherwise ends its leases.
        lease_id = self._blocks.lease(finished.block_ids, self._request.deadline)
        self._leases.append(lease_id)
        self._events.put_nowait((finished, lease_id))

    def end(self, token: Token) -> None:
        """Prefill is done; all blocks have been added."""
        self._events.put_nowait(token)

    def fail(self, error: EpdError) -> None:
        self._events.put_nowait(error)

    def release(self) -> None:
        """End all leases: the puller has gone, or the request has. Those that have ended are no error."""
        self._is_released = True
        for lease_id in self._leases:
            self._blocks.release(lease_id)

    @property
    def is_over(self) -> bool:
        """Every lease has ended: the puller has its copy."""
        return not any(self._blocks.owns(lease_id, ()) for lease_id in self._leases)

    async def run(self) -> bool:
        """Send until the end; from then on the puller releases each run. False: the request failed or the puller left."""
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, EpdError):
                    self._reply.fail(event)
                    return False
                if isinstance(event, Token):
                    request = self._request
                    await self._reply.item(Handoff(request.request_id, request.epoch, request.num_tokens, event))
                    self._reply.end()
                    return True
                await self._send(*event)
        except EpdError:
            return False  # the puller left: its gateway decides what becomes of the request

    async def _send(self, finished: FinishedBlocks, lease_id: int) -> None:
        """One run of blocks. In one process nothing is copied, so there is nothing to check."""
        checksums: list[int] = []
        if not self._is_local:
            checksums = await on_stream(self._stream, self._memory.checksum, finished.block_ids)
        ref = KVRef(
            worker=self._sender.pool.worker,
            generation=self._sender.pool.generation,
            layout=self._sender.pool.layout,
            lease_id=lease_id,
            request_id=self._request.request_id,
            epoch=self._request.epoch,
            first_block=finished.first_block,
            block_ids=finished.block_ids,
            checksums=tuple(checksums),
        )
        await self._reply.item(KVChunk(ref))


class EarlyPulls:
    """Pulls that were heard before their prompt: the two come over different links.

    They wait as long as links may differ, not as long as the request: its prefill may be over, or never begin.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parked: dict[RequestId, tuple[PullKV, Mail, float]] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def park(self, message: PullKV, mail: Mail) -> None:
        older = self._parked.pop(message.request_id, None)
        if older is not None:
            older[1].reply.fail(StaleHandle("a newer attempt pulls"))
        self._parked[message.request_id] = (message, mail, self._clock() + min(message.deadline_s, _PARKED_S))
        mail.reply.on_cancel(self._dropper(message.request_id, message.epoch))

    def take(self, request_id: RequestId, epoch: int) -> tuple[PullKV, Mail] | None:
        """The pull that waits for this attempt; one for an older attempt is refused."""
        parked = self._parked.get(request_id)
        if parked is None or parked[0].epoch > epoch:
            return None
        del self._parked[request_id]
        if parked[0].epoch < epoch:
            parked[1].reply.fail(StaleHandle(f"request {request_id} is at attempt {epoch} by now"))
            return None
        return parked[0], parked[1]

    def drop(self, request_id: RequestId, epoch: int) -> None:
        parked = self._parked.get(request_id)
        if parked is not None and parked[0].epoch <= epoch:
            del self._parked[request_id]
            parked[1].reply.fail(StaleHandle(f"request {request_id} is not, or no longer, prefilled here"))

    def expire(self, now: float) -> None:
        for request_id, (message, _, deadline) in list(self._parked.items()):
            if deadline <= now:
                self.drop(request_id, message.epoch)

    def _dropper(self, request_id: RequestId, epoch: int) -> Callable[[], None]:
        return lambda: self.drop(request_id, epoch)
