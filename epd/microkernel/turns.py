"""Who waits for room to tell an actor at the other end of a link: one after the other, per actor.

Owns the waiters. What room there is the connection knows; what waiting for too long means, the link.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    def __init__(self, room_of: Callable[[str], int]) -> None:
        """`room_of(actor)`: tells that may be sent to it now."""
        self._room_of = room_of
        self._waiters: dict[str, deque[asyncio.Future[None]]] = {}
        self._is_over = False

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiters.values()))

    def is_free(self, actor: str) -> bool:
        """Whether a tell may go at once: there is room, and nobody waits for it."""
        return actor not in self._waiters and self._room_of(actor) > 0

    async def take(self, actor: str) -> None:
        """Return when there is room and all who came before have had theirs, or when it is over. To be followed by `offer`."""
        await self._wait(actor)
        while self._room_of(actor) <= 0 and not self._is_over:  # somebody else was quicker
            await self._wait(actor)

    def offer(self, actor: str) -> None:
        """There may be room: wake whoever waits longest."""
        queue = self._waiters.get(actor)
        while queue and self._room_of(actor) > 0:
            waiter = queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def end(self) -> None:
        """The link is lost: nobody waits any more."""
        self._is_over = True
        for queue in self._waiters.values():
            for waiter in queue:
                if not waiter.done():
                    waiter.set_result(None)

    async def _wait(self, actor: str) -> None:
        waiter = asyncio.get_running_loop().create_future()
        queue = self._waiters.setdefault(actor, deque())
        queue.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter not in queue:
                self.offer(actor)  # it was offered and is not used: the next one's
            raise
        finally:
            if waiter in queue:
                queue.remove(waiter)
            if not queue and self._waiters.get(actor) is queue:
                del self._waiters[actor]
