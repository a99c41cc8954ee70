"""Products of joined and of separate weights, with bias, shared out over threads."""

from __future__ import annotations

import pytest
import torch

from epd.model import linear
from epd.model.linear import Linear
from epd.model.weights import Weights
from gpu.team import Team

NAMES = ["q", "k", "v"]


def _weights(*, is_shared: bool) -> Weights:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in zip(NAMES, (130, 40, 7), strict=True):
        tensors[f"{name}.weight"] = torch.randn(size, 33, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(size, generator=generator)
    return Weights(tensors, is_shared=is_shared)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_outputs_follow_each_other(bias: bool, num_rows: int) -> None:
    weights = _weights(is_shared=False)
    x = torch.randn(num_rows, 33)
    expected = torch.cat([x @ weights.tensor(f"{n}.weight").t() + weights.tensor(f"{n}.bias") * bias for n in NAMES], dim=1)
    out = torch.empty(num_rows, 177)
    Linear(weights, NAMES, bias=bias)(x, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_shared_pages_are_kept_unless_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, separate = _weights(is_shared=True), _weights(is_shared=True)
    x, out, other = torch.randn(3, 33), torch.empty(3, 177), torch.empty(3, 177)
    Linear(joined, NAMES)(x, out)
    assert joined.joined(["q.weight", "k.weight", "v.weight"]) is not None
    monkeypatch.setattr("epd.model.weights._JOIN_BYTES", 1000)
    before = separate.tensor("k.weight").data_ptr()
    Linear(separate, NAMES)(x, other)
    assert separate.tensor("k.weight").data_ptr() == before
    assert separate.joined(["q.weight", "k.weight", "v.weight"]) is None
    assert torch.equal(out, other)


@pytest.mark.parametrize("num_rows", [1, 6])
def test_threads_change_nothing(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_WORTH_SHARING", 0)
    layer = Linear(_weights(is_shared=False), NAMES)
    x, alone, shared = torch.randn(num_rows, 33), torch.empty(num_rows, 177), torch.empty(num_rows, 177)
    layer(x, alone)
    team = Team(3)
    layer(x, shared, team)
    team.close()
    assert torch.equal(alone, shared)
