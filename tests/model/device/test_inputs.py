"""What is staged arrives as it was, however late the device copies it, and nobody waits for that."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd.model.device.inputs import Layout, Staging
from epd.model.device.work_queue import HostQueue
from tests.model.device.lagging import LaggingQueue

ONE = Layout({"numbers": (torch.int64, (5,))})
TWO = Layout({"numbers": (torch.int64, (500,))})

shapes = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.int32, torch.float32, torch.float64]),
        st.lists(st.integers(0, 7), min_size=1, max_size=3),
    ),
    max_size=6,
)


@given(shapes)
def test_arrays_lie_side_by_side_and_arrive_whole(arrays: list[tuple[torch.dtype, list[int]]]) -> None:
    layout = Layout({str(i): (dtype, tuple(shape)) for i, (dtype, shape) in enumerate(arrays)})
    staging = Staging(HostQueue())
    staged = staging.begin(layout)
    for i in range(len(arrays)):
        staged[str(i)][...] = i + 1
    sent = staging.send(staged)
    for i, (dtype, shape) in enumerate(arrays):
        assert sent[str(i)].dtype == dtype
        assert list(sent[str(i)].shape) == shape
        assert bool((sent[str(i)] == i + 1).all())


def test_memory_is_not_written_while_a_copy_reads_it() -> None:
    queue = LaggingQueue()
    staging = Staging(queue)
    targets = [torch.zeros(ONE.num_bytes, dtype=torch.uint8) for _ in range(4)]
    for i, target in enumerate(targets):
        staged = staging.begin(ONE)
        staged["numbers"][:] = i
        staging.send(staged, target)
    queue.catch_up()
    assert [int(ONE.tensors(target)["numbers"][0]) for target in targets] == [0, 1, 2, 3]


def test_memory_is_used_again_as_soon_as_its_copy_is_done() -> None:
    queue = LaggingQueue()
    staging = Staging(queue)
    for _ in range(10):  # one step is ahead of the device, no more
        staging.send(staging.begin(ONE))
        if len(queue.waiting) > 1:
            queue.catch_up(1)
    assert len(queue.host_memories) == 2


def test_memory_that_is_too_small_is_let_go() -> None:
    queue = LaggingQueue()
    staging = Staging(queue)
    for layout in (ONE, TWO, ONE, TWO, ONE):
        staged = staging.begin(layout)
        staged["numbers"][:] = layout.num_bytes
        sent = staging.send(staged)
        queue.catch_up()
        assert bool((sent["numbers"] == layout.num_bytes).all())
    assert len(queue.host_memories) == 2


def test_rows_are_uploaded_in_the_dtype_of_the_model() -> None:
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 9), np.float32))
    staging = Staging(HostQueue())
    first, second = (staging.upload(rows * i, torch.bfloat16) for i in (1, 2))
    assert torch.equal(first, rows.bfloat16())
    assert torch.equal(second, (rows * 2).bfloat16())
