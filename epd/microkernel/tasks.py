"""Tasks that have an owner: none is lost to the garbage collector, none outlives the owner, no exception goes unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from epd.log import Log

_log = Log("tasks")


async def settled(*tasks: asyncio.Task[Any]) -> None:
    """Wait until all have ended, for cleaning up: a caller that is cancelled meanwhile waits on, and is cancelled then."""
    cancelled: asyncio.CancelledError | None = None
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class TaskOwner:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coro: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Cancel all and wait for their end."""
        while self._tasks:
            tasks = set(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task crashed", error=error, task=task.get_name())
