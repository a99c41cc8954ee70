"""What EPD is compared with says the same tokens: its steps mix prompts and tokens, and nothing else is different."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from epd.config import EngineConfig, ServeConfig, parse
from epd.options import BUNDLED_MODEL
from epd.request import GenerateRequest
from protocol.messages import RequestId, Sampling
from tests.e2e.mix import ask_at_once, ask_one_by_one, cases
from tests.support.cluster import node_cluster
from tools.gpu_check import colocated
from tools.gpu_check.colocated import Running, plan_step, serve


def running(num_prompt: int, *, num_scheduled: int = 0, num_output: int = 0, max_tokens: int = 8, **more: Any) -> Running:
    request = GenerateRequest(RequestId(f"{num_prompt}"), (1,) * num_prompt, (), Sampling(max_tokens=max_tokens))
    positions = np.zeros((3, num_prompt), np.int32)
    return Running(request, positions, 0, num_scheduled=num_scheduled, output=[7] * num_output, **{"is_encoded": True, **more})


def engine(**changed: int) -> EngineConfig:
    config = parse(["serve", "--token-budget", "20", "--budget-beside-decode", "16", "--max-chunk-tokens", "10"])
    assert isinstance(config, ServeConfig)
    return replace(config.engine, **changed)


def counts(all_running: Sequence[Running]) -> list[tuple[int, int, bool]]:
    return [(each.num_prompt, count, samples) for each, count, samples in plan_step(all_running, engine()).parts]


def test_tokens_first_then_prompts_in_order_under_one_budget() -> None:
    """Two tokens leave 14 of 16: ten for the first prompt's chunk, four for the second's, none for the third's."""
    decoding = [running(3, num_scheduled=3, num_output=1), running(4, num_scheduled=5, num_output=2)]
    prompts = [running(20), running(6), running(7)]
    assert counts([prompts[0], *decoding, *prompts[1:]]) == [(3, 1, True), (4, 1, True), (20, 10, False), (6, 4, False)]
    assert counts(prompts) == [(20, 10, False), (6, 6, True), (7, 4, False)]  # nobody's token waits for them: 20


def test_a_prompt_s_last_chunk_draws_and_what_is_not_encoded_waits() -> None:
    assert counts([running(20, num_scheduled=13), running(5, is_encoded=False)]) == [(20, 7, True)]


@pytest.mark.parametrize(
    "done",
    [
        running(3, num_scheduled=10, num_output=8),
        running(3, num_scheduled=9, num_output=7, num_in_flight=1),
        running(3, num_scheduled=4, num_output=1, has_left=True),
        running(3, has_left=True),
    ],
)
def test_whoever_has_all_tokens_or_has_left_takes_no_part(done: Running) -> None:
    assert counts([done]) == []


async def test_it_says_what_the_stages_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [case for case in cases() if case.is_greedy and case.body.get("n", 1) == 1][:8]
    async with node_cluster() as stages:
        wanted = await ask_one_by_one(stages.url, chosen)
    words = ["serve", "--port", "0", "--model", str(BUNDLED_MODEL), "--max-chunk-tokens", "16", "--token-budget", "64"]
    config = parse([*words, "--kv-mib", "64", "--embedding-mib", "8"])
    assert isinstance(config, ServeConfig)
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, stop))
    try:
        url = ""
        while not url and not task.done():
            await asyncio.sleep(0)
            url = capsys.readouterr().out.strip().removeprefix("ready at ")
        assert await ask_at_once(url, chosen) == wanted
    finally:
        stop.set()
        await task
    assert colocated.ROLES == ("encode", "prefill", "decode")
