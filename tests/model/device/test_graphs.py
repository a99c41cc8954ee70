"""Which graph a step takes, and that each is captured once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd.model.device.graphs import GraphOptions, Graphs, Work, batch_buckets
from epd.model.device.work_queue import CudaQueue, HostQueue, Mark


def test_the_buckets() -> None:
    assert batch_buckets(128) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    assert batch_buckets(200) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 200)
    assert batch_buckets(24) == (1, 2, 4, 8, 16, 24)
    assert batch_buckets(1) == (1,)
    assert batch_buckets(0) == ()


@given(st.integers(1, 600), st.data())
def test_every_step_fits_the_smallest_bucket_there_is(most: int, data: st.DataObject) -> None:
    graphs = Graphs(HostQueue(), _nothing, GraphOptions(), most)
    batch = data.draw(st.integers(1, most))
    bucket = graphs.bucket_of(batch)
    if batch > 512:
        assert bucket is None
        return
    assert bucket is not None
    assert batch <= bucket <= min(most, 512)
    assert all(smaller < batch for smaller in graphs.buckets if smaller < bucket)
    assert bucket < 2 * batch or bucket == 1


def test_without_graphs_there_is_no_bucket() -> None:
    graphs = Graphs(HostQueue(), _nothing, GraphOptions(max_batch=0), 8)
    assert graphs.bucket_of(1) is None
    assert graphs.at_start == ()


def test_no_rows_need_no_graph() -> None:
    graphs = Graphs(HostQueue(), _nothing, GraphOptions(captured_at_start=4), 6)
    assert graphs.bucket_of(0) is None
    assert graphs.at_start == (1, 2, 4)


def test_what_is_captured_is_replayed() -> None:
    runs: list[int] = []

    def ways_of(batch: int) -> dict[str, Work]:
        return {"only": lambda: runs.append(batch)}

    graphs = Graphs(HostQueue(), ways_of, GraphOptions(), 8)
    graphs.capture(1)
    graphs.capture(2)
    for batch in (2, 1, 2):
        graphs.replay(batch)
    assert graphs.captured == {1, 2}
    assert runs == [1, 2, 2, 1, 2]  # a capture runs the work as well
    assert not graphs.timed


@given(st.lists(st.integers(1, 100), min_size=2, max_size=4))
def test_the_fastest_way_is_kept_whatever_the_first_round_takes(durations: list[int]) -> None:
    queue, runs = SteppedQueue(), [0] * len(durations)

    def way(place: int) -> None:
        runs[place] += 1
        is_first_replay = runs[place] == 2  # the run that goes with the capture is the first
        queue.at += 1000 if is_first_replay else durations[place]

    graphs = Graphs(queue, lambda batch: {f"way {i}": partial(way, i) for i in range(len(durations))}, GraphOptions(), 4)
    graphs.capture(2)
    assert graphs.timed == {2: {f"way {i}": float(duration) for i, duration in enumerate(durations)}}
    assert queue.waited_at == queue.at  # what was timed is over
    assert len(set(runs)) == 1
    graphs.replay(2)
    assert runs.index(max(runs)) == durations.index(min(durations))


class SteppedQueue(HostQueue):
    """Whose clock is moved by what is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.at = self.waited_at = 0

    def mark(self) -> Mark:
        return SteppedMark(self, self.at)


@dataclass
class SteppedMark:
    queue: SteppedQueue
    at: int

    def has_passed(self) -> bool:
        return True

    def wait(self) -> None:
        self.queue.waited_at = self.at

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, SteppedMark)
        return float(self.at - earlier.at)


def _nothing(batch: int) -> dict[str, Work]:
    return {"only": lambda: None}


@pytest.mark.gpu
def test_a_captured_function_reads_what_its_memory_holds_at_the_launch() -> None:
    queue = CudaQueue(torch.device("cuda", 0))
    x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")

    def work() -> None:
        torch.add(x, 1, out=y)

    replay = queue.capture(work)
    x.fill_(5)
    replay()
    mark = queue.mark()
    mark.wait()
    assert mark.has_passed()
    assert y.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_a_graph_may_be_let_go_before_the_next_is_captured() -> None:
    queue = CudaQueue(torch.device("cuda", 0))
    x = torch.zeros(4, device="cuda")

    def work() -> None:
        x.add_(torch.ones_like(x))  # takes memory of the graphs' pool

    for _ in range(3):
        queue.capture(work)()
        torch.cuda.synchronize()
        gc.collect()
    assert x.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_device_alone() -> None:
    queue = CudaQueue(torch.device("cuda", 0))
    x = torch.ones(4, device="cuda")
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        queue.capture(work)
    assert x.sum().item() == 4


@pytest.mark.gpu
def test_memory_that_is_let_go_during_a_capture_can_be_used_again() -> None:
    """Steps in flight come back on another thread, and drop what they brought, while the next one captures its graph."""
    queue = CudaQueue(torch.device("cuda", 0))
    x = torch.ones(1 << 20, device="cuda")
    stage = torch.cuda.Stream()
    with torch.cuda.stream(stage):
        held: list[Any] = [queue.host_memory(x.nbytes), torch.empty_like(x)]
        queue.copy(x.view(torch.uint8), held[0])
        held[1].record_stream(stage)

        runs: list[int] = []

        def work() -> None:
            x.mul_(1)
            runs.append(1)
            if len(runs) == 2:  # the one that is captured
                held.clear()

        queue.capture(work)()
        for _ in range(3):  # asks how far the streams are that have used what was dropped
            assert len(queue.host_memory(x.nbytes)) == x.nbytes
            torch.empty_like(x)
    torch.cuda.synchronize()


class FakeStream:
    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


class FakeTorch:
    """With as much of torch.cuda as a capture asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = FakeStream(priority=-5)
        self.current = [self.stage]
        self.seen: list[tuple[str, FakeStream, bool, str]] = []  # what, on which stream, collected meanwhile, the error mode
        self.pools: list[object] = []
        fake = self

        class FakeGraph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                fake.pools.append(pool)
                fake.note("begin", capture_error_mode)

            def capture_end(self) -> None:
                fake.note("end")

            def replay(self) -> None:
                fake.note("replay")

        fakes = {
            "device": lambda _: nullcontext(),
            "current_stream": lambda: self.current[-1],
            "Stream": FakeStream,
            "stream": self._use,
            "graph_pool_handle": object,
            "CUDAGraph": FakeGraph,
        }
        for name, each in fakes.items():
            monkeypatch.setattr(torch.cuda, name, each)

    def note(self, what: str, mode: str = "") -> None:
        self.seen.append((what, self.current[-1], gc.isenabled(), mode))

    @contextmanager
    def _use(self, stream: FakeStream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()


def test_what_is_captured_is_a_stream_that_nothing_else_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorch(monkeypatch)
    queue, stage = CudaQueue(torch.device("cuda", 0)), fake.stage
    for _ in range(2):
        queue.capture(lambda: fake.note("work"))()
    side = fake.seen[0][1]
    assert side is not stage
    assert side.priority == stage.priority
    assert side.waited_for == [stage, stage]
    assert stage.waited_for == [side, side]
    once = [
        ("work", side, False, ""),
        ("begin", side, False, "thread_local"),
        ("work", side, False, ""),
        ("end", side, False, ""),
        ("replay", stage, True, ""),
    ]
    assert fake.seen == once * 2


def test_graphs_share_a_pool_for_as_long_as_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pool that all graphs have left torch says that it is used and then that it is not."""
    fake = FakeTorch(monkeypatch)
    queue = CudaQueue(torch.device("cuda", 0))
    replays = [queue.capture(lambda: None) for _ in range(3)]
    del replays[0]
    replays.append(queue.capture(lambda: None))
    assert len(set(map(id, fake.pools))) == 1
    replays.clear()
    replays.append(queue.capture(lambda: None))
    assert fake.pools[-1] is not fake.pools[0]
