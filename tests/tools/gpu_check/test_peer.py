"""transformers' own model over its static cache, on the CPU: the rows that it gives, and what it says where it gives none."""

from __future__ import annotations

import pytest
import torch

from tests.tools.gpu_check.rigs import FOLDER, LIMITS, LOADS, ScriptedTimer, rows_of
from tools.gpu_check.figures import peer
from tools.gpu_check.figures.counts import decode_weight_bytes, kv_token_bytes, prefill_flop, vision_flop
from tools.gpu_check.figures.peer import PeerRig
from tools.gpu_check.found import Missing


@pytest.fixture(scope="module")
def rig() -> PeerRig:
    rig = PeerRig(FOLDER, torch.device("cpu"), torch.float32, LIMITS, LOADS)
    rig.timer = ScriptedTimer(1e-3)
    return rig


def test_each_row_is_counted_as_ours(rig: PeerRig) -> None:
    found = list(peer.run(rig))
    rows = rows_of(each for each in found if not isinstance(each, Missing))
    config = rig.config
    assert config.vision is not None
    weights, kv = decode_weight_bytes(config, 4), kv_token_bytes(config.text, 4)
    assert {name.removeprefix("transformers: "): row["value"] for name, row in rows.items()} == pytest.approx(
        {
            "prefill, 96 tokens, in one chunk": prefill_flop(config.text, 96) / 1e-3 / 1e12,
            "vision tower, 2 images of 64 x 64": 2 * vision_flop(config.vision, 64) / 1e-3 / 1e12,
            "decode step, batch 1, context 64: bytes read": weights / 1e-3 / 1e9,
            "decode step, batch 12, context 48: bytes read": (weights + 12 * (48 - 1) * kv) / 1e-3 / 1e9,
        }
    )
    assert all(row["bar"] == "" for row in rows.values())
    assert [each for each in found if isinstance(each, Missing)] == [
        Missing(f"transformers, compiled: decode step, batch {batch}", reason="no time was left to compile it")
        for batch in ("1, context 64", "12, context 48")
    ]


def test_its_cache_is_as_full_as_the_context_and_moves_on(rig: PeerRig) -> None:
    cache = peer._cache(rig, 2, 48, 5)
    assert cache.layers[0].keys.shape == (2, 2, 48, 32)
    assert int(cache.get_seq_length()) == 43
    with torch.no_grad():
        rig.model.model.language_model(input_ids=torch.ones(2, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    assert int(cache.get_seq_length()) == 44


def test_what_fails_says_why(rig: PeerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(peer, "_cache", out_of_memory)
    missing = {each.name: each.reason for each in peer.run(rig) if isinstance(each, Missing)}
    assert missing["transformers: decode step, batch 1, context 64"] == "RuntimeError: CUDA out of memory"


def test_a_compilation_that_takes_too_long_is_no_figure(rig: PeerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.no_grad():
        row = peer._decode(rig, 1, 64, compiled=True)
        assert row["name"] == "transformers, compiled: decode step, batch 1, context 64: bytes read"
        monkeypatch.setattr(peer, "COMPILE_S", -1.0)
        with pytest.raises(RuntimeError, match="compiling took"):
            peer._decode(rig, 1, 64, compiled=True)
