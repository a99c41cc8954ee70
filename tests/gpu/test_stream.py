from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from gpu.errors import StreamClosed
from gpu.stream import HostStream


@pytest.fixture
def stream() -> Iterator[HostStream]:
    opened = HostStream("test")
    yield opened
    opened.close()


def test_calls_run_in_order_on_one_other_thread(stream: HostStream) -> None:
    seen: list[int] = []
    futures = [stream.submit(seen.append, i) for i in range(100)]
    for future in futures:
        future.result()
    assert seen == list(range(100))
    threads = {stream.submit(threading.get_ident).result() for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_arguments_and_results_pass(stream: HostStream) -> None:
    def join(left: str, right: str, *, between: str) -> str:
        return left + between + right

    assert stream.submit(join, "a", "b", between="-").result() == "a-b"


def test_an_error_is_its_future_s_and_the_next_call_runs(stream: HostStream) -> None:
    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        stream.submit(fail).result()
    assert stream.submit(int, "3").result() == 3


def test_a_call_cancelled_before_its_turn_does_not_run(stream: HostStream) -> None:
    go = threading.Event()
    ran: list[str] = []
    first = stream.submit(go.wait)
    second = stream.submit(ran.append, "second")
    third = stream.submit(ran.append, "third")
    assert second.cancel()
    go.set()
    third.result()
    assert first.result()
    assert not first.cancel()
    assert ran == ["third"]
    with pytest.raises(CancelledError):
        second.result()


def test_close_finishes_what_runs_and_fails_what_waits() -> None:
    stream = HostStream("test")
    running, go = threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        go.wait()
        return "done"

    first = stream.submit(work)
    second = stream.submit(int)
    running.wait()
    closer = threading.Thread(target=stream.close)
    closer.start()
    while True:  # until close has begun, what is submitted is taken
        try:
            stream.submit(int)
        except StreamClosed:
            break
    go.set()
    closer.join()
    assert first.result() == "done"
    with pytest.raises(StreamClosed):
        second.result()


def test_after_close_nothing_is_taken_and_the_thread_is_gone() -> None:
    stream = HostStream("test-close")
    thread = stream.submit(threading.current_thread).result()
    stream.close()
    stream.close()
    assert not thread.is_alive()
    with pytest.raises(StreamClosed):
        stream.submit(int)


def test_a_call_may_close_its_own_stream() -> None:
    stream = HostStream("test")
    thread = stream.submit(threading.current_thread).result()
    stream.submit(stream.close).result()
    thread.join()


def test_it_holds_no_result_while_it_waits(stream: HostStream) -> None:
    released = threading.Event()

    class Large:
        def __del__(self) -> None:
            released.set()

    stream.submit(Large).result()
    assert released.wait(timeout=30)


@pytest.mark.parametrize("priority", [-1, 20])
def test_a_priority_that_is_none_is_refused(priority: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.19"):
        HostStream("test", priority=priority)


def test_a_priority_is_the_thread_s_alone() -> None:
    import os

    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    stream = HostStream("test", priority=nice() + 3)
    assert stream.submit(nice).result() == nice() + 3
    stream.close()
