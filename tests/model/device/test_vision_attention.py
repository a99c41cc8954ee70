"""Attention of a batch against attention written out; the choice among kernels; which images get a launch of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import epd.model.device.vision_attention as attention
from epd.model.device.vision_attention import Kernel, Sequences, Timed, choose, cudnn, dense, flash, pick
from epd.model.device.work_queue import open_queue


def _written_out(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    out, start = [], 0
    for length in sequences.lengths:
        a, b, c = (each[start : start + length].float() for each in (q, k, v))
        weights = (torch.einsum("qhd,khd->hqk", a, b) * q.shape[2] ** -0.5).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, c))
        start += length
    return torch.cat(out)


def _batch(
    lengths: list[int], *, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Sequences]:
    """Queries and keys side by side in one tensor, values among what they are no part of, as the tower has them."""
    random = torch.Generator().manual_seed(len(lengths))
    qk = torch.randn(sum(lengths), 2, heads, head_dim, generator=random).to(device, dtype)
    v = torch.randn(sum(lengths), 3, heads, head_dim, generator=random).to(device, dtype)[:, 2]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return qk[:, 0], qk[:, 1], v, Sequences(tuple(lengths), starts)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8).map(sorted), st.integers(1, 4), st.sampled_from([2, 8, 18]))
def test_dense_attention_is_attention(lengths: list[int], heads: int, head_dim: int) -> None:
    q, k, v, sequences = _batch(lengths, heads=heads, head_dim=head_dim)
    torch.testing.assert_close(dense(q, k, v, sequences), _written_out(q, k, v, sequences), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("seconds", "picked"),
    [
        ({"flash": 1.0, "cudnn": 0.95, "dense": 0.5}, "flash"),  # not worth a plan per length
        ({"flash": 1.0, "cudnn": 0.89, "dense": 0.5}, "cudnn"),
        ({"flash": 1.0, "cudnn": None, "dense": 0.5}, "flash"),
        ({"flash": None, "cudnn": 0.1, "dense": 0.5}, "dense"),  # short images have nothing to go through
        ({"flash": None, "cudnn": None, "dense": 0.5}, "dense"),
    ],
)
def test_a_kernel_is_picked_by_what_it_takes(seconds: dict[str, float | None], picked: str) -> None:
    assert pick([Timed(name, each) for name, each in seconds.items()]) == picked


def test_nothing_is_timed_where_there_is_one_kernel() -> None:
    assert choose(open_queue("cpu"), num_heads=2, head_dim=8, dtype=torch.float32) == (dense, [])


@pytest.mark.parametrize("lengths", [[3, 5, 9], [9, 9, 12], [12, 13], [3, 12, 12]])
def test_long_images_get_launches_of_their_own_and_short_ones_share_one(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[str, int]] = []

    def batched(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        launched.append(("batched", len(sequences.lengths)))
        assert sequences.starts.tolist() == [sum(sequences.lengths[:i]) for i in range(len(sequences.lengths) + 1)]
        return dense(q, k, v, sequences)

    def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        launched.append(("single", len(q)))
        return dense(q, k, v, Sequences((len(q),), torch.tensor([0, len(q)])))

    monkeypatch.setattr(attention, "LONG", 10)
    monkeypatch.setattr(attention, "flash", batched)
    monkeypatch.setattr(attention, "_cudnn_one", single)
    q, k, v, sequences = _batch(lengths, heads=2, head_dim=8)
    torch.testing.assert_close(cudnn(q, k, v, sequences), _written_out(q, k, v, sequences), rtol=1e-4, atol=1e-5)
    short, long = [n for n in lengths if n < 10], [n for n in lengths if n >= 10]
    assert launched == ([("batched", len(short))] if short else []) + [("single", n) for n in long]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [flash, cudnn, dense], ids=["flash", "cudnn", "dense"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("lengths", [[1], [16, 17, 300], [64, 64, 4096, 4500], [4096]])
def test_every_kernel_is_attention(kernel: Kernel, head_dim: int, lengths: list[int]) -> None:
    q, k, v, sequences = _batch(lengths, heads=16, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(kernel(q, k, v, sequences).float(), _written_out(q, k, v, sequences), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_every_kernel_works_for_the_published_tower() -> None:
    kernel, timed = choose(open_queue("cuda"), num_heads=16, head_dim=72, dtype=torch.bfloat16)
    assert {each.name for each in timed if each.seconds} == {"flash", "cudnn", "dense"}
    names: dict[Callable[..., Tensor], str] = {flash: "flash", cudnn: "cudnn", dense: "dense"}
    assert names[kernel] == pick(timed)
