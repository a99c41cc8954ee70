"""A stream: calls that run one after the other, in the order given, off the caller's thread. And the CPU's, a thread."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, Protocol, TypeVar

from gpu.deferred import Deferred
from gpu.errors import StreamClosed

P = ParamSpec("P")
T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[[], Any]]


class Stream(Protocol):
    """Calls in order, one at a time, off the caller's thread.

    A call returns as soon as its work has been given to the device, and the next one begins; its future resolves when the device
    has finished the work. So a device always has the next call's work before it is done with the last.
    """

    def submit(self, fn: Callable[P, T | Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def close(self) -> None: ...


class HostStream:
    """Owned by whoever opened it, who closes it.

    `priority` is the nice value of its thread: 0 (as the process) to 19 (last). Only for work that seldom needs the interpreter's
    lock: a thread that is kept waiting while it has the lock keeps all others waiting.
    """

    def __init__(self, name: str, *, priority: int = 0) -> None:
        if not 0 <= priority <= 19:
            raise ValueError(f"a stream's priority is 0..19, not {priority}")
        self.name = name
        self._priority = priority
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[P, T | Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run fn(*args, **kwargs) after all that was submitted before. A future cancelled before its turn is passed over."""
        future: Future[T] = Future()
        with self._closing:  # nothing may be put behind the end mark
            if self._closed:
                raise StreamClosed(f"stream {self.name} has been closed")
            self._work.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def close(self) -> None:
        """Finish the call that is running, fail those waiting with StreamClosed, and end the thread. May be called again."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        if self._priority:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._priority)
        while (work := self._work.get()) is not None:
            future, call = work
            if not future.set_running_or_notify_cancel():
                continue
            if self._closed:
                future.set_exception(StreamClosed(f"stream {self.name} was closed before this ran"))
                continue
            try:
                self._settle(future, call())
            except BaseException as error:
                future.set_exception(error)
            del work, future, call  # hold nothing while waiting for more

    def _settle(self, future: Future[Any], value: Any) -> None:
        """Here a call's work is done when it returns."""
        future.set_result(value.value() if isinstance(value, Deferred) else value)
