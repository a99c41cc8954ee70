"""Trains the bundled checkpoint: `python -m tools.tiny_model.train --work-dir DIR`, then `tools.tiny_model.export`.

The state is saved every hundred steps and a run that is started again in the same folder goes on from there. The
learning rate warms up, stays, and falls to zero over the last part; exports take the running mean of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tools.tiny_model.batches import Batch, BatchMaker, Mix
from tools.tiny_model.heads import Heads
from tools.tiny_model.network import forward, model_config
from tools.tiny_model.optimiser import Muon
from tools.tiny_model.tasks import TASKS
from tools.tiny_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCAB_SIZE,
    train_tokenizer,
)

_EMA_DECAY = 0.995
_LEAST_DOUBT = 0.1  # per token; no token weighs more than ten times its share in a plain mean
_TWO_IMAGE_LOSS_WEIGHT = 0.7  # these teach little that one image does not


@dataclass(frozen=True, slots=True)
class Settings:
    """One training run."""

    work_dir: Path
    start_from: Path | None
    steps: int
    peak_lr: float
    warmup: int
    decay_steps: int
    heads_weight: float
    save_every: int
    evaluate_every: int
    held_out: int
    seed: int
    mix: Mix


def main() -> None:
    settings = _parse()
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    Trainer(settings).run()


class Trainer:
    """Owns model, optimisers and files of one run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tokenizer = _tokenizer(settings.work_dir)
        self._batches = BatchMaker(self._tokenizer, seed=settings.seed, mix=settings.mix)
        self._model = Qwen3VLForConditionalGeneration(bundled_config(self._tokenizer))
        self._heads = Heads(num_features=1 + len(self._model.model.visual.deepstack_visual_indexes))
        self._ema = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(_EMA_DECAY))
        self._optimisers = _optimisers(self._model, self._heads)
        self._step = 0
        self._seconds = 0.0
        if self._state_path.exists():
            self._restore()
        elif settings.start_from:
            self._start_from(settings.start_from)

    def run(self) -> None:
        """Trains up to the last step; prints and logs losses and held-out accuracy."""
        settings = self._settings
        bar = tqdm(total=settings.steps, initial=self._step, unit="step", mininterval=5, smoothing=0.05)
        while self._step < settings.steps:
            began = time.monotonic()
            losses = self._train_step()
            self._step += 1
            self._seconds += time.monotonic() - began
            bar.update()
            bar.set_postfix(losses)
            if self._step % 50 == 0:
                self._log({"step": self._step, "seconds": round(self._seconds), **losses})
            if self._step % settings.evaluate_every == 0 or self._step == settings.steps:
                self._log({"step": self._step, "accuracy": self._accuracy()})
            if self._step % settings.save_every == 0 or self._step == settings.steps:
                self._save()

    def _train_step(self) -> dict[str, float]:
        settings = self._settings
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self._step, settings)
            optimiser.zero_grad(set_to_none=True)
        losses: dict[str, float] = {}
        for batch in self._batches.training(self._step):
            result = forward(self._model, batch)
            loss = answer_loss(result.logits, batch.tokens[batch.answers])
            name = _name(batch)
            losses[name] = round(loss.item(), 4)
            loss = loss * (_TWO_IMAGE_LOSS_WEIGHT if name == "pair" else 1.0)
            asked = self._heads.loss(batch, result) if settings.heads_weight else None
            if asked is not None:
                losses[f"{name}_heads"] = round(asked.item(), 4)
                loss = loss + settings.heads_weight * asked
            loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
        self._ema.update_parameters(self._model)
        return losses

    @torch.no_grad()
    def _accuracy(self) -> dict[str, float]:
        """Share of held-out answers that greedy decoding would give exactly.

        Greedy decoding says the right answer exactly if every token is the likeliest one after the right ones before it,
        so one forward pass tells.
        """
        model = self._ema.module
        accuracy = {}
        for task in TASKS:
            batch = self._batches.held_out(task, self._settings.held_out)
            logits = forward(model, batch).logits
            right = torch.zeros_like(batch.answers)
            right[batch.answers] = logits.argmax(-1) == batch.tokens[batch.answers]
            accuracy[task] = round((right | ~batch.answers).all(-1).float().mean().item(), 4)
        return accuracy

    def _save(self) -> None:
        """Replaces the state in one move, so that a run killed while saving loses nothing."""
        state = {
            "step": self._step,
            "seconds": self._seconds,
            "model": self._model.state_dict(),
            "heads": self._heads.state_dict(),
            "ema": self._ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
        }
        partial = self._state_path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._state_path)

    def _restore(self) -> None:
        state = torch.load(self._state_path, weights_only=True)
        self._step = state["step"]
        self._seconds = state["seconds"]
        self._model.load_state_dict(state["model"])
        self._heads.load_state_dict(state["heads"])
        self._ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def _start_from(self, path: Path) -> None:
        """Takes over the running mean of another run's weights, and nothing else."""
        ema = torch.load(path, weights_only=True)["ema"]
        self._ema.load_state_dict(ema)
        self._model.load_state_dict(self._ema.module.state_dict())

    def _log(self, entry: dict[str, object]) -> None:
        tqdm.write(json.dumps(entry))
        with (self._settings.work_dir / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")

    @property
    def _state_path(self) -> Path:
        return self._settings.work_dir / "state.pt"


def answer_loss(logits: Tensor, expected: Tensor) -> Tensor:
    """Cross entropy, averaged with more weight on tokens that are still doubtful. logits: [tokens, vocabulary].

    Nearly all tokens of a long count are easy; the few that decide where to stop would drown in a plain mean.
    """
    losses = F.cross_entropy(logits, expected, reduction="none")
    doubts = 1 - torch.exp(-losses.detach())
    return (losses * doubts).sum() / (doubts.sum() + _LEAST_DOUBT * len(doubts))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `decay_steps`."""
    rising = (step + 1) / settings.warmup
    falling = (settings.steps - step) / settings.decay_steps
    return settings.peak_lr * min(1.0, rising, falling)


def bundled_config(tokenizer: Tokenizer) -> Qwen3VLConfig:
    """The bundled model's config with this tokenizer's special tokens."""
    vocabulary = tokenizer.get_vocab()
    names = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    }
    return model_config({name: vocabulary[token] for name, token in names.items()}, VOCAB_SIZE)


def _tokenizer(work_dir: Path) -> Tokenizer:
    path = work_dir / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def _optimisers(model: Qwen3VLForConditionalGeneration, heads: Heads) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for tables, norms, biases and what leads into or out of the vision layers.

    The mergers' 512 x 512 matrices would cost Muon a quarter of each step.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = list(heads.parameters())
    for name, parameter in model.named_parameters():
        in_layer = ".layers." in name or ".blocks." in name
        (matrices if parameter.ndim == 2 and in_layer else others).append(parameter)
    return [
        Muon(matrices, lr=0.0, momentum=0.95, weight_decay=0.05),  # type: ignore[arg-type]  # they are parameters
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _name(batch: Batch) -> str:
    if batch.pictures is None:
        return "text"
    return "image" if len(batch.pictures.patches) == len(batch.tokens) else "pair"


def _parse() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny-vl"), help="tokenizer, state and log")
    parser.add_argument("--start-from", type=Path, metavar="STATE", help="another run's state.pt to take weights from")
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps in all")
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    parser.add_argument("--decay-steps", type=int, default=700, help="last steps, over which the rate falls to zero")
    parser.add_argument("--heads-weight", type=float, default=0.5, help="weight of the throw-away heads; 0 is off")
    parser.add_argument("--one-image", type=int, default=Mix().one_image, help="one-image conversations per step")
    parser.add_argument("--two-images", type=int, default=Mix().two_images, help="two-image conversations per step")
    parser.add_argument("--text", type=int, default=Mix().text, help="text conversations per step")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out checks")
    parser.add_argument("--held-out", type=int, default=64, help="questions per task in a held-out check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return Settings(
        work_dir=args.work_dir,
        start_from=args.start_from,
        steps=args.steps,
        peak_lr=args.peak_lr,
        warmup=args.warmup,
        decay_steps=args.decay_steps,
        heads_weight=args.heads_weight,
        save_every=args.save_every,
        evaluate_every=args.evaluate_every,
        held_out=args.held_out,
        seed=args.seed,
        mix=Mix(args.one_image, args.two_images, args.text),
    )


if __name__ == "__main__":
    main()
