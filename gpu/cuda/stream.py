"""A CUDA stream and the two threads that keep it busy: one gives the device work, the other waits for it to be done.

The launcher runs each call, which returns as soon as its work is queued on the device, records an event and goes on with the next
call. The waiter takes the events in order, blocked in the driver without the interpreter's lock, and resolves the futures. So the
device has the next call's work while it is at the last, and nobody asks it over and over whether it is done.

An error of the device (an illegal address, say) shows at some later event and is the end of the context. Everything that is
waiting then fails with DeviceFailed, and so does everything after it.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from gpu.cuda.driver import Driver
from gpu.deferred import Deferred
from gpu.errors import DeviceFailed, StreamClosed

P = ParamSpec("P")
T = TypeVar("T")
_Work = tuple["Future[Any]", Callable[[], Any]]
_NICEST = 19


class CudaStream:
    """Owned by whoever opened it, who closes it.

    `priority` is as a host stream's: 0 first, 19 last, spread over the few priorities that the device has (six, as a rule).
    Waiting kernels of a stream that goes first begin before those of others; what runs is not stopped, copies are not ordered.
    """

    def __init__(self, driver: Driver, name: str, *, priority: int = 0) -> None:
        if not 0 <= priority <= _NICEST:
            raise ValueError(f"a stream's priority is 0..{_NICEST}, not {priority}")
        self.name = name
        self._driver = driver
        self.handle = driver.create_stream(_device_priority(priority, *driver.priorities()))
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._spare_events: list[int] = []
        self._closing = threading.Lock()
        self._closed = False
        self._failure: DeviceFailed | None = None
        self._launcher = threading.Thread(target=self._launch_all, name=name, daemon=True)
        self._waiter = threading.Thread(target=self._wait_for_all, name=f"{name} done", daemon=True)
        self._launcher.start()
        self._waiter.start()

    def submit(self, fn: Callable[P, T | Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run fn(*args, **kwargs) after all that was submitted before, with this as its thread's stream.

        The future resolves when the device has done what the call gave it, also when the call raised. One that was cancelled
        before its turn is passed over.
        """
        future: Future[T] = Future()
        with self._closing:  # nothing may be put behind the end mark
            if self._closed:
                raise StreamClosed(f"stream {self.name} has been closed")
            self._work.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def close(self) -> None:
        """Finish what the device was given, fail the calls that were not begun with StreamClosed, end. May be called again."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._work.put(None)
        if threading.current_thread() not in (self._launcher, self._waiter):
            self._launcher.join()
            self._waiter.join()

    # --- the launcher -------------------------------------------------------------------------------------------------

    def _launch_all(self) -> None:
        self._driver.use()
        with self._driver.on_stream(self.handle):
            while (work := self._work.get()) is not None:
                future, call = work
                if future.set_running_or_notify_cancel():
                    self._launched.put(self._launch(future, call))
                del work, future, call  # hold nothing while waiting for more
        self._launched.put(None)

    def _launch(self, future: Future[Any], call: Callable[[], Any]) -> _Launched:
        if self._failure is not None:
            return _Launched(future, error=self._failure)
        if self._closed:
            return _Launched(future, error=StreamClosed(f"stream {self.name} was closed before this ran"))
        launched = _Launched(future)
        try:
            launched.value = call()
        except BaseException as error:
            launched.error = error
        try:
            event = self._spare_events.pop() if self._spare_events else self._driver.create_event()
            launched.event = event
            self._driver.record(event, self.handle)
        except DeviceFailed as error:
            self._failure = launched.error = error
        return launched

    # --- the waiter ---------------------------------------------------------------------------------------------------

    def _wait_for_all(self) -> None:
        self._driver.use()
        while (launched := self._launched.get()) is not None:
            self._finish(launched)
            del launched
        with suppress(DeviceFailed):  # of a lost context nothing can be destroyed
            for event in self._spare_events:
                self._driver.destroy_event(event)
            self._driver.destroy_stream(self.handle)

    def _finish(self, launched: _Launched) -> None:
        """In order, and an event is used again only by the launcher after it has been waited for here."""
        if launched.event is not None and self._failure is None:
            try:
                self._driver.wait(launched.event)
            except DeviceFailed as error:
                self._failure = error
            else:
                self._spare_events.append(launched.event)
        if self._failure is not None and not isinstance(launched.error, StreamClosed):
            launched.error = self._failure
        launched.resolve()


class _Launched:
    """A call that was made, on its way from the launcher to the waiter."""

    __slots__ = ("error", "event", "future", "value")

    def __init__(self, future: Future[Any], *, error: BaseException | None = None) -> None:
        self.future = future
        self.value: Any = None
        self.error = error
        self.event: int | None = None

    def resolve(self) -> None:
        value, error = self.value, self.error
        self.value = self.error = None  # an error's traceback knows this object, and would keep it and the memory it works on
        if error is None:
            try:
                self.future.set_result(value.value() if isinstance(value, Deferred) else value)
            except BaseException as late:
                self.future.set_exception(late)
        else:
            self.future.set_exception(error)


def _device_priority(priority: int, least: int, greatest: int) -> int:
    """0..19 onto least..greatest, of which the greatest is the lower number."""
    return greatest + round(priority * (least - greatest) / _NICEST)
