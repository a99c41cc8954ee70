from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future

import pytest

from gpu.cuda.stream import CudaStream
from gpu.deferred import Deferred
from gpu.errors import DeviceFailed, StreamClosed
from tests.gpu.cuda.fake_driver import FakeDriver


class Later(Deferred[str]):
    """Gives its value when asked, and notes when that was."""

    def __init__(self, text: str, order: list[str]) -> None:
        self._text = text
        self._order = order

    def value(self) -> str:
        self._order.append(self._text)
        return self._text


def later(text: str, order: list[str]) -> str | Deferred[str]:
    return Later(text, order)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    driver = FakeDriver()
    driver.use()
    yield driver
    assert driver.left() == {}


@pytest.fixture
def stream(driver: FakeDriver) -> Iterator[CudaStream]:
    opened = CudaStream(driver, "test")
    yield opened
    driver.release()
    opened.close()


def launches(driver: FakeDriver, stream: CudaStream, done: list[str], name: str) -> Callable[[], str]:
    """A call that gives the device one thing to do."""

    def call() -> str:
        driver.enqueue(stream.handle, lambda: done.append(name))
        return name

    return call


def test_a_future_resolves_when_the_device_is_done_and_not_before(driver: FakeDriver, stream: CudaStream) -> None:
    done: list[str] = []
    driver.hold(stream.handle)
    future = stream.submit(launches(driver, stream, done, "a"))
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 2)  # the work, and the event behind it
    driver.step(stream.handle)
    assert done == ["a"]
    assert not future.done()
    driver.step(stream.handle)
    assert future.result(timeout=60) == "a"


def test_the_next_call_is_launched_while_the_device_is_at_the_last(driver: FakeDriver, stream: CudaStream) -> None:
    done: list[str] = []
    driver.hold(stream.handle)
    futures = [stream.submit(launches(driver, stream, done, name)) for name in "abc"]
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 6)
    assert done == []
    assert not any(future.done() for future in futures)
    driver.release(stream.handle)
    assert [future.result(timeout=60) for future in futures] == ["a", "b", "c"]
    assert done == ["a", "b", "c"]


def test_what_comes_later_is_asked_for_in_order_and_once(driver: FakeDriver, stream: CudaStream) -> None:
    order: list[str] = []
    driver.hold(stream.handle)
    futures = [stream.submit(later, name, order) for name in "abc"]
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 3)
    assert order == []
    driver.release(stream.handle)
    assert [future.result(timeout=60) for future in futures] == ["a", "b", "c"]
    assert order == ["a", "b", "c"]


def test_what_comes_later_may_fail(stream: CudaStream) -> None:
    class Fails(Deferred[int]):
        def value(self) -> int:
            raise KeyError("late")

    def fail() -> int | Deferred[int]:
        return Fails()

    with pytest.raises(KeyError, match="late"):
        stream.submit(fail).result(timeout=60)
    assert stream.submit(int, "3").result(timeout=60) == 3


def test_calls_run_on_one_thread_with_the_stream_as_theirs(driver: FakeDriver, stream: CudaStream) -> None:
    found = {stream.submit(lambda: (threading.get_ident(), driver.current_stream())).result(timeout=60) for _ in range(3)}
    assert found == {(found.copy().pop()[0], stream.handle)}
    assert threading.get_ident() not in {thread for thread, _ in found}
    assert driver.current_stream() == 0


def test_a_call_that_fails_is_reported_when_the_device_has_done_what_it_began(driver: FakeDriver, stream: CudaStream) -> None:
    done: list[str] = []

    def fail() -> None:
        driver.enqueue(stream.handle, lambda: done.append("begun"))
        raise KeyError("gone")

    driver.hold(stream.handle)
    future = stream.submit(fail)
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 2)
    assert not future.done()
    driver.release(stream.handle)
    with pytest.raises(KeyError, match="gone"):
        future.result(timeout=60)
    assert done == ["begun"]
    assert stream.submit(int, "3").result(timeout=60) == 3


def test_a_call_cancelled_before_its_turn_does_not_run(stream: CudaStream) -> None:
    go = threading.Event()
    ran: list[str] = []
    first = stream.submit(go.wait)
    second = stream.submit(ran.append, "second")
    third = stream.submit(ran.append, "third")
    assert second.cancel()
    go.set()
    third.result(timeout=60)
    assert first.result()
    assert ran == ["third"]
    with pytest.raises(CancelledError):
        second.result()


def test_what_the_device_has_begun_cannot_be_cancelled(driver: FakeDriver, stream: CudaStream) -> None:
    driver.hold(stream.handle)
    future = stream.submit(int)
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 1)
    assert not future.cancel()


def test_close_finishes_what_the_device_has_and_fails_the_rest(driver: FakeDriver) -> None:
    stream = CudaStream(driver, "test")
    running, go = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> str:
        running.set()
        go.wait()
        return "ran"

    driver.hold(stream.handle)
    launched = stream.submit(later, "launched", order)
    runs = stream.submit(work)
    waits = stream.submit(int)
    running.wait()
    closer = threading.Thread(target=stream.close)
    closer.start()
    while True:  # until close has begun, what is submitted is taken
        try:
            stream.submit(int)
        except StreamClosed:
            break
    go.set()
    driver.wait_for(lambda: driver.num_waiting(stream.handle) == 2)
    assert not launched.done()
    driver.release(stream.handle)
    closer.join()
    assert (launched.result(), runs.result()) == ("launched", "ran")
    with pytest.raises(StreamClosed):
        waits.result()


def test_after_close_nothing_is_taken_and_nothing_is_left(driver: FakeDriver) -> None:
    stream = CudaStream(driver, "test-close")
    for _ in range(3):
        stream.submit(int).result(timeout=60)
    stream.close()
    stream.close()
    assert driver.left() == {}
    assert not [thread for thread in threading.enumerate() if "test-close" in thread.name]
    with pytest.raises(StreamClosed):
        stream.submit(int)


def test_a_call_may_close_its_own_stream_and_so_may_who_is_told_that_it_is_done(driver: FakeDriver) -> None:
    first = CudaStream(driver, "first")
    first.submit(first.close).result(timeout=60)
    second = CudaStream(driver, "second")
    closed = threading.Event()

    def close(_: Future[int]) -> None:
        second.close()
        closed.set()

    second.submit(int).add_done_callback(close)
    assert closed.wait(timeout=60)
    first.close()
    second.close()


def test_few_events_are_made_for_many_calls(driver: FakeDriver, stream: CudaStream) -> None:
    for _ in range(100):
        stream.submit(int).result(timeout=60)
    assert driver.left()["events"] <= 2


def test_it_holds_no_result_while_it_waits(stream: CudaStream) -> None:
    released = threading.Event()

    class Large:
        def __del__(self) -> None:
            released.set()

    stream.submit(Large).result(timeout=60)
    assert released.wait(timeout=30)


class TestADeviceThatFails:
    @pytest.fixture
    def driver(self) -> FakeDriver:
        driver = FakeDriver()
        driver.use()
        return driver

    def test_all_that_wait_are_told(self, driver: FakeDriver) -> None:
        stream = CudaStream(driver, "test")
        go = threading.Event()
        driver.hold(stream.handle)
        futures: list[Future[object]] = [stream.submit(call) for call in (object, object, go.wait, object)]
        driver.wait_for(lambda: driver.num_waiting(stream.handle) == 2)
        driver.fail()
        go.set()
        for future in futures:
            with pytest.raises(DeviceFailed, match="cudaErrorIllegalAddress"):
                future.result(timeout=60)
        stream.close()

    def test_nothing_runs_after_it(self, driver: FakeDriver) -> None:
        stream = CudaStream(driver, "test")
        driver.fail()
        ran: list[str] = []
        with pytest.raises(DeviceFailed):
            stream.submit(int).result(timeout=60)
        with pytest.raises(DeviceFailed):
            stream.submit(ran.append, "ran").result(timeout=60)
        assert ran == []
        stream.close()

    def test_close_ends_all_the_same(self, driver: FakeDriver) -> None:
        stream = CudaStream(driver, "test-failed")
        driver.hold(stream.handle)
        future = stream.submit(int)
        driver.wait_for(lambda: driver.num_waiting(stream.handle) == 1)
        driver.fail()
        stream.close()
        with pytest.raises(DeviceFailed):
            future.result(timeout=60)
        assert not [thread for thread in threading.enumerate() if "test-failed" in thread.name]


@pytest.mark.parametrize("priority", [-1, 20])
def test_a_priority_that_is_none_is_refused(driver: FakeDriver, priority: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.19"):
        CudaStream(driver, "test", priority=priority)


def test_priorities_are_spread_over_those_of_the_device(driver: FakeDriver) -> None:
    made: list[int] = []
    create = driver.create_stream
    driver.create_stream = lambda priority: made.append(priority) or create(priority)  # type: ignore
    for priority in (0, 5, 10, 19):
        CudaStream(driver, "test", priority=priority).close()
    assert made == [-5, -4, -2, 0]
