"""A coroutine that was run up to its first wait outside of its task, and is finished inside it.

Knows only how coroutines and tasks talk: a coroutine yields the future that it waits for, the task sends or throws the outcome
in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class HeadStart:
    """`first` is what `coro` yielded when it was started. Await it, or `cancelled()`, in the task that it is to belong to."""

    def __init__(self, coro: Coroutine[Any, Any, None], first: Any) -> None:
        self._coro = coro
        self._first = first
        self._is_cancelled = False

    async def cancelled(self) -> None:
        """Finish it as a task would that is cancelled where it waits."""
        self._is_cancelled = True
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        coro, waits_for = self._coro, self._first
        try:
            if self._is_cancelled:
                waits_for = coro.throw(asyncio.CancelledError())
            while True:
                try:
                    outcome = yield waits_for
                except BaseException as error:
                    waits_for = coro.throw(error)
                else:
                    waits_for = coro.send(outcome)
        except StopIteration:
            return
