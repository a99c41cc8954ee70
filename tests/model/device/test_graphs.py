"""Which graph a step takes, and that each is captured once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd.model.device.graphs import GraphOptions, Graphs, batch_buckets
from epd.model.device.work_queue import CudaQueue, HostQueue


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
    graphs = Graphs(HostQueue(), _nothing, GraphOptions(), 6)
    assert graphs.bucket_of(0) is None
    assert graphs.at_start == (1, 2, 4)


def test_what_is_captured_is_replayed() -> None:
    runs: list[int] = []

    def work_of(batch: int) -> Callable[[], None]:
        return lambda: runs.append(batch)

    graphs = Graphs(HostQueue(), work_of, GraphOptions(), 8)
    graphs.capture(1)
    graphs.capture(2)
    for batch in (2, 1, 2):
        graphs.replay(batch)
    assert graphs.captured == {1, 2}
    assert runs == [1, 2, 2, 1, 2]  # a capture runs the work as well


def _nothing(batch: int) -> Callable[[], None]:
    return lambda: None


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
