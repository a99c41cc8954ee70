"""The model on its own, beside `transformers` `generate`: `python -m tools.bench.engine`.

Both run the same checkpoints (the geometry of Qwen3-0.6B, and a small one with experts; random weights, float32) in this
process, with as many threads, in turns, on the same prompts. A figure is the median over all steps of all turns. Sampling is
greedy and part of a step in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

import epd
from epd.model.config import load_model_config
from epd.model.runner import TextModelRunner
from epd.model.weights import load_text_weights
from epd.step import SampleRequest, SequenceStep, StepPlan
from gpu.backend import open_backend
from gpu.kernels.compiler import warm_up
from gpu.pool import PoolSpec
from protocol.messages import RequestId, Sampling
from tools.bench.checkpoint import experts_checkpoint, qwen3_checkpoint
from tools.bench.rows import Row, make_row, render

_BATCHES = (1, 8, 32)
_PREFILL_TOKENS = 1024
_PROMPT_TOKENS = 16
_BLOCK_SIZE = 16
_BUNDLED = Path(epd.__file__).parent / "assets"


def run(
    *,
    folder: Path | None = None,
    num_threads: int = 1,
    rounds: int = 3,
    num_steps: int = 8,
    batches: Sequence[int] = _BATCHES,
    prefill_tokens: int = _PREFILL_TOKENS,
) -> list[Row]:
    """Rows of the comparison, with bars; and, without, the bundled model's bare steps. Some minutes.

    `folder`: another checkpoint in place of both.
    """
    torch.set_num_threads(num_threads)
    folders = {"engine": folder} if folder else {"engine": qwen3_checkpoint(), "engine, experts": experts_checkpoint()}
    rows = []
    for name, each in folders.items():
        pair = _Pair(each, num_threads, max_tokens=max(prefill_tokens, 32 * (_PROMPT_TOKENS + num_steps + 2)))
        rows += _compare(name, pair, num_threads, rounds, num_steps, batches, prefill_tokens)
        pair.close()
    return rows + _bundled_rows(num_threads)


def _compare(
    name: str, pair: _Pair, num_threads: int, rounds: int, num_steps: int, batches: Sequence[int], prefill_tokens: int
) -> list[Row]:
    note = f"baseline: transformers generate, {num_threads} thread{'s' * (num_threads > 1)} each"
    rows = []
    with tqdm(total=rounds * (1 + len(batches)), desc=name) as bar:
        for batch in batches:
            ours, theirs = _in_turns(pair, rounds, batch, _PROMPT_TOKENS, num_steps, bar)
            speeds = [batch / each.step_s for each in (ours, theirs)]
            rows.append(
                make_row(f"{name}, decode, batch {batch}", speeds[0], "tokens/s", baseline=speeds[1], bar=">=1", note=note)
            )
            if batch == 1 and pair.config.text.experts is None:  # of experts, few are read
                rows.append(_bandwidth_row(pair, ours.step_s))
        ours, theirs = _in_turns(pair, rounds, 1, prefill_tokens, 0, bar)
        speeds = [prefill_tokens / each.first_s for each in (ours, theirs)]
        rows.append(make_row(f"{name}, prefill, {prefill_tokens} tokens", speeds[0], "tokens/s", baseline=speeds[1], bar=">=1"))
    return rows


@dataclass
class _Times:
    """What a run took: prompt to first token, and each token after."""

    firsts_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return statistics.median(self.firsts_s)

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)

    def add(self, stamps: Sequence[float]) -> None:
        gaps = [after - before for before, after in pairwise(stamps)]
        self.firsts_s.append(gaps[0])
        self.steps_s += gaps[1:]


class _Pair:
    """One checkpoint, loaded by both."""

    def __init__(self, folder: Path, num_threads: int, *, max_tokens: int) -> None:
        self.config = load_model_config(folder)
        self.weights = load_text_weights(self.config, folder)
        self._backend = open_backend("cpu")
        block_bytes = int(np.prod(self.config.kv_block_shape(_BLOCK_SIZE))) * 4
        num_blocks = max_tokens // _BLOCK_SIZE + 64
        pool = self._backend.allocate_pool(PoolSpec(num_blocks, block_bytes, "kv", self.config.kv_layout(_BLOCK_SIZE)))
        self._runner = TextModelRunner(self.config, self.weights, self._backend, pool, _BLOCK_SIZE, num_threads)
        self._reference = _load_reference(folder)
        warm_up()

    def ours(self, prompts: npt.NDArray[np.int32], num_steps: int) -> list[float]:
        """Greedy tokens for prompts [batch, n]: when it began, and when each step was done."""
        batch, length = prompts.shape
        blocks = -(-(length + num_steps + 1) // _BLOCK_SIZE)
        tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        outputs = np.empty((batch, num_steps + 1), np.int32)
        stamps = [time.perf_counter()]
        for step in range(num_steps + 1):
            first, last = (0, length) if step == 0 else (length + step - 1, length + step)
            positions = np.tile(np.arange(first, last, dtype=np.int32), (3, 1))
            plan = StepPlan(
                tuple(
                    SequenceStep(
                        RequestId(str(i)),
                        prompts[i] if step == 0 else outputs[i, step - 1 : step],
                        first,
                        positions,
                        tables[i],
                        (),
                        SampleRequest(Sampling(temperature=0.0), prompts[i], outputs[i, :step]),
                    )
                    for i in range(batch)
                )
            )
            tokens = self._runner.execute(plan).tokens
            outputs[:, step] = [token.token_id for token in tokens if token is not None]
            stamps.append(time.perf_counter())
        return stamps

    def theirs(self, prompts: npt.NDArray[np.int32], num_steps: int) -> list[float]:
        stamps = [time.perf_counter()]

        def stamp(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        token_ids = torch.from_numpy(prompts.astype(np.int64))
        self._reference.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_steps + 1,
            min_new_tokens=num_steps + 1,
            do_sample=False,
            stopping_criteria=[stamp],
        )
        return stamps

    def close(self) -> None:
        self._runner.close()
        self._backend.close()


def _in_turns(pair: _Pair, rounds: int, batch: int, length: int, num_steps: int, bar: tqdm[Any]) -> tuple[_Times, _Times]:
    times: tuple[_Times, _Times] = (_Times(), _Times())
    random = np.random.default_rng(0)
    for turn in range(rounds):
        bar.set_postfix_str(f"batch {batch}, {length} tokens")
        prompts = random.integers(0, 256, (batch, length)).astype(np.int32)
        sides: list[tuple[Callable[[npt.NDArray[np.int32], int], list[float]], _Times]] = [
            (pair.ours, times[0]),
            (pair.theirs, times[1]),
        ]
        for side, collected in sides if turn % 2 == 0 else reversed(sides):
            collected.add(side(prompts, num_steps))
        bar.update()
    return times


def _bandwidth_row(pair: _Pair, step_s: float) -> Row:
    """Every weight is read once per step; a row of the embedding table more or less does not count."""
    buffer = torch.ones(1 << 26)  # 256 MiB, beyond any cache
    rates = []
    for _ in range(7):
        started = time.perf_counter()
        buffer.sum()
        rates.append(buffer.numel() * 4 / (time.perf_counter() - started) / 1e9)
    limit = max(rates)
    reached = pair.weights.num_bytes / step_s / 1e9
    note = f"share of what one pass of torch.sum over 256 MiB reads per second ({limit:.1f} GB/s)"
    return make_row("engine, decode, batch 1: memory read", reached, "GB/s", baseline=limit, note=note)


def _bundled_rows(num_threads: int) -> list[Row]:
    """Bare steps of the bundled model: what serving overhead is compared with."""
    folders = [file.parent for file in sorted(_BUNDLED.glob("*/config.json"))]
    rows = []
    for folder in folders:
        pair = _Pair(folder, num_threads, max_tokens=32 * 128)
        for batch in (1, 32):
            with tqdm(total=5, desc=folder.name, leave=False) as bar:
                ours, theirs = _in_turns(pair, 5, batch, 64, 40, bar)
            name = f"engine, {folder.name}, step, batch {batch}"
            rows.append(make_row(name, 1e3 * ours.step_s, "ms", baseline=1e3 * theirs.step_s))
        pair.close()
    return rows


def _load_reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForCausalLM if load_model_config(folder).vision is None else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.bench.engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads for each (1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns for each (3)")
    parser.add_argument("--checkpoint", type=Path, help="another folder than the one that is built and kept")
    args = parser.parse_args()
    print(render(run(folder=args.checkpoint, num_threads=args.threads, rounds=args.rounds)))
