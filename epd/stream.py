"""Where the event loop meets a device stream: work is handed over and awaited, the loop never blocks on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:  # a gateway imports this module and needs no kernels
    from gpu.deferred import Deferred
    from gpu.stream import Stream


P = ParamSpec("P")
T = TypeVar("T")


async def on_stream(stream: Stream, work: Callable[P, T | Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` on the stream and return what it returns, or what that stands for, once the device is done with it.

    When the caller is cancelled, work that has begun is waited for, however often that happens: it may be reading or writing
    memory that the caller would give to somebody else next.
    """
    submitted = stream.submit(work, *args, **kwargs)
    future = asyncio.wrap_future(submitted)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not submitted.cancel() and not future.done():  # `future` would agree to be cancelled also while the work runs
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        raise
