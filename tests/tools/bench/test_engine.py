"""The engine benchmark on a checkpoint so small that only its rows matter, and that both sides do the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench import engine
from tools.bench.checkpoint import experts_checkpoint, qwen3_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    target = tmp_path_factory.mktemp("bench") / "small"
    return qwen3_checkpoint(target, **small, num_key_value_heads=2, vocab_size=400)


def test_rows_have_bars_and_baselines(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "_BUNDLED", tmp_path)  # no bundled model: only the comparison
    rows = engine.run(folder=folder, rounds=1, num_steps=2, batches=(1, 3), prefill_tokens=40)
    assert [(row["name"], row["unit"], row["bar"]) for row in rows] == [
        ("engine, decode, batch 1", "tokens/s", ">=1"),
        ("engine, decode, batch 1: memory read", "GB/s", ""),
        ("engine, decode, batch 3", "tokens/s", ">=1"),
        ("engine, prefill, 40 tokens", "tokens/s", ">=1"),
    ]
    assert all(row["ratio"] is not None and row["ratio"] > 0 for row in rows)


def test_without_a_folder_both_checkpoints_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16, "moe_intermediate_size": 16}
    other = experts_checkpoint(tmp_path / "experts", **small, num_key_value_heads=2, vocab_size=400)
    monkeypatch.setattr(engine, "_BUNDLED", tmp_path / "none")
    monkeypatch.setattr(engine, "qwen3_checkpoint", lambda: folder)
    monkeypatch.setattr(engine, "experts_checkpoint", lambda: other)
    rows = engine.run(rounds=1, num_steps=1, batches=(1,), prefill_tokens=20)
    assert [row["name"] for row in rows] == [
        "engine, decode, batch 1",
        "engine, decode, batch 1: memory read",
        "engine, prefill, 20 tokens",
        "engine, experts, decode, batch 1",
        "engine, experts, prefill, 20 tokens",
    ]


def test_both_sides_take_the_same_steps(folder: Path) -> None:
    pair = engine._Pair(folder, 1, max_tokens=512)
    prompts = np.random.default_rng(1).integers(0, 256, (3, 9)).astype(np.int32)
    assert len(pair.ours(prompts, 4)) == len(pair.theirs(prompts, 4)) == 6  # the beginning, the first token, four steps
    generated = pair._reference.generate(torch.from_numpy(prompts.astype(np.int64)), max_new_tokens=5, min_new_tokens=5)
    assert generated.shape == (3, 14)
    pair.close()
