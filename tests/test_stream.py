from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from epd.stream import on_stream
from gpu.stream import HostStream


@pytest.fixture
def stream() -> Iterator[HostStream]:
    opened = HostStream("test")
    yield opened
    opened.close()


async def test_results_and_errors_come_back(stream: HostStream) -> None:
    assert await on_stream(stream, int, "12", base=3) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        await on_stream(stream, int, "x")


@pytest.mark.parametrize("num_times", [1, 2, 3])
async def test_work_that_has_begun_is_waited_for_when_its_caller_is_cancelled(stream: HostStream, num_times: int) -> None:
    begun, go = threading.Event(), threading.Event()
    ends: list[str] = []

    def work() -> None:
        begun.set()
        go.wait()
        ends.append("work")

    async def caller() -> None:
        try:
            await on_stream(stream, work)
        finally:
            ends.append("caller")

    task = asyncio.create_task(caller())
    await asyncio.to_thread(begun.wait)
    for _ in range(num_times):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)  # let the cancellation go as far as it can
    ended_early = list(ends)
    go.set()
    assert ended_early == []
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["work", "caller"]


async def test_work_that_has_not_begun_is_dropped_when_its_caller_is_cancelled(stream: HostStream) -> None:
    go = threading.Event()
    ran: list[str] = []
    blocker = stream.submit(go.wait)
    task = asyncio.create_task(on_stream(stream, ran.append, "late"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await asyncio.wrap_future(blocker)
    assert ran == []
