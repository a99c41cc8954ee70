"""Training: a run that was cut off goes on as if it had not been, and what it leaves can be exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tools.tiny_model.batches import Mix
from tools.tiny_model.export import export
from tools.tiny_model.reference import Reference
from tools.tiny_model.tasks import TASKS
from tools.tiny_model.tokenizer import train_tokenizer
from tools.tiny_model.train import Settings, Trainer, learning_rate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(num_examples=100)


@pytest.fixture
def settings(tmp_path: Path, tokenizer: Tokenizer) -> Settings:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Settings(
        work_dir=tmp_path,
        start_from=None,
        steps=4,
        peak_lr=1e-3,
        warmup=2,
        decay_steps=2,
        heads_weight=0.5,
        save_every=2,
        evaluate_every=100,
        held_out=1,
        seed=0,
        mix=Mix(one_image=2, two_images=1, text=1),
    )


def trained(settings: Settings) -> dict[str, torch.Tensor]:
    """The weights after a run in the settings' folder."""
    torch.manual_seed(settings.seed)
    Trainer(settings).run()
    weights: dict[str, torch.Tensor] = torch.load(settings.work_dir / "state.pt", weights_only=True)["model"]
    return weights


def test_a_run_that_was_cut_off_goes_on_with_the_same_steps(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(settings)
    again = replace(settings, work_dir=tmp_path / "again")
    again.work_dir.mkdir()
    (settings.work_dir / "tokenizer.json").rename(again.work_dir / "tokenizer.json")
    with monkeypatch.context() as patch:
        step = Trainer._train_step

        def cut_off_at_the_third(trainer: Trainer) -> dict[str, float]:
            if trainer._step == 3:
                raise KeyboardInterrupt
            return step(trainer)

        patch.setattr(Trainer, "_train_step", cut_off_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            trained(again)
    resumed = trained(again)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_run_can_start_from_the_mean_of_the_first(settings: Settings, tmp_path: Path) -> None:
    trained(settings)
    second = replace(settings, work_dir=tmp_path / "second", start_from=tmp_path / "state.pt", steps=0)
    second.work_dir.mkdir()
    (tmp_path / "tokenizer.json").rename(second.work_dir / "tokenizer.json")
    trainer = Trainer(second)
    mean = torch.load(tmp_path / "state.pt", weights_only=True)["ema"]
    assert all(torch.equal(weight, mean[f"module.{name}"]) for name, weight in trainer._model.state_dict().items())


def test_what_a_run_leaves_can_be_exported_and_loaded(settings: Settings, tmp_path: Path, tokenizer: Tokenizer) -> None:
    trained(settings)
    state = torch.load(settings.work_dir / "state.pt", weights_only=True)
    export(state["ema"], tokenizer, tmp_path / "out")
    loaded = Reference(tmp_path / "out")._model.state_dict()
    mean = {name.removeprefix("module."): tensor for name, tensor in state["ema"].items() if name != "n_averaged"}
    assert loaded.keys() == mean.keys()
    assert all(torch.equal(loaded[name], mean[name]) for name in mean)


def test_the_rate_rises_stays_and_falls(settings: Settings) -> None:
    long = replace(settings, steps=100, warmup=10, decay_steps=40, peak_lr=1.0)
    rates = [learning_rate(step, long) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 40)


def test_held_out_checks_are_logged(settings: Settings) -> None:
    trained(replace(settings, steps=1))
    (line,) = (settings.work_dir / "log.jsonl").read_text().splitlines()
    assert set(json.loads(line)["accuracy"]) == set(TASKS)
