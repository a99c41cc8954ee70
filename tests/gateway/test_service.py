"""The gateway's engine over stages that can be checked: choices, stop strings, admission, what it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from epd.errors import Overloaded
from epd.gateway.admission import Admission
from epd.gateway.attempt import Stages
from epd.gateway.service import Gateway, _with_seed_of
from epd.request import Delta, GenerateRequest
from protocol.messages import RequestId, Sampling
from tests.support.stages import expected_tokens
from tests.support.world import World, world

THREE = {"e0": "encode", "p0": "prefill", "d0": "decode"}
PROMPT = list(range(100, 117))


class _Numbers:
    """A tokenizer whose token n reads " n"."""

    def token_bytes(self, token_id: int) -> bytes:
        return f" {token_id}".encode()

    spelling = token_bytes

    def is_special(self, token_id: int) -> bool:
        return False


@asynccontextmanager
async def _gateway(*, max_requests: int = 8) -> AsyncIterator[tuple[World, Gateway]]:
    async with world(THREE) as made:
        yield (
            made,
            Gateway(
                model_name="numbers",
                tokenizer=_Numbers(),  # type: ignore[arg-type]
                stages=Stages(made.gateway, made.fleet, made.router, made.clock, made.observer),
                admission=Admission(max_requests=max_requests, max_prompt_tokens=1000),
            ),
        )


async def _run(gateway: Gateway, request: GenerateRequest) -> list[Delta]:
    async with aclosing(gateway.generate(request)) as deltas:
        return [delta async for delta in deltas]


def _text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def _words(tokens: list[int]) -> str:
    return "".join(f" {token}" for token in tokens)


async def test_one_choice() -> None:
    async with _gateway() as (made, gateway):
        deltas = await _run(gateway, made.request(PROMPT, 5))
        assert _text(deltas) == _words(expected_tokens(PROMPT, 5))
        assert [delta.finish_reason for delta in deltas] == [""] * 4 + ["length"]
        assert sum(delta.num_tokens for delta in deltas) == 5
        again = await _run(gateway, made.request(PROMPT, 5))
        assert (deltas[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 16)


async def test_choices_differ_by_seed_and_each_ends_once() -> None:
    async with _gateway() as (made, gateway):
        request = dataclasses.replace(made.request(PROMPT, 6, seed=5), n=3)
        deltas = await _run(gateway, request)
        texts = [_text(deltas, index) for index in range(3)]
        assert texts[0] == _words(expected_tokens(PROMPT, 6, seed=5))
        assert len(set(texts)) == 3
        assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2]
        repeated = await _run(gateway, dataclasses.replace(made.request(PROMPT, 6, seed=5), n=3))
        assert [_text(repeated, index) for index in range(3)] == texts


async def test_a_stop_string_ends_the_request_everywhere() -> None:
    async with _gateway() as (made, gateway):
        due = expected_tokens(PROMPT, 30)
        request = dataclasses.replace(made.request(PROMPT, 30), stop=(f" {due[3]}",))
        deltas = await _run(gateway, request)
        assert _text(deltas) == _words(due[:3])
        assert deltas[-1].finish_reason == "stop"
        await made.settle()


async def test_leaving_early_ends_all_choices() -> None:
    async with _gateway() as (made, gateway):
        deltas = gateway.generate(dataclasses.replace(made.request(PROMPT, 30), n=3))
        await anext(deltas)
        await deltas.aclose()
        await made.settle()


async def test_a_full_server_refuses_before_any_work() -> None:
    async with _gateway(max_requests=1) as (made, gateway):
        first = gateway.generate(made.request(PROMPT, 30))
        await anext(first)
        with pytest.raises(Overloaded) as refused:
            await _run(gateway, made.request(PROMPT, 5))
        assert refused.value.retry_after_s > 0
        await first.aclose()
        assert _text(await _run(gateway, made.request(PROMPT, 5))) == _words(expected_tokens(PROMPT, 5))


async def test_what_is_counted() -> None:
    async with _gateway(max_requests=1) as (made, gateway):
        await _run(gateway, made.request(PROMPT, 5))
        left = gateway.generate(made.request(PROMPT, 5))
        await anext(left)
        await left.aclose()
        text = gateway.metrics().decode()
        for line in (
            'epd_requests_total{outcome="ok"} 1.0',
            'epd_requests_total{outcome="cancelled"} 1.0',
            "epd_requests_running 0.0",
            f"epd_prompt_tokens_total {2.0 * len(PROMPT)}",
            "epd_generation_tokens_total 6.0",
            "epd_time_to_first_token_seconds_count 2.0",
            "epd_inter_token_latency_seconds_count 4.0",
            "epd_e2e_request_latency_seconds_count 1.0",
            'epd_slo_requests_total{met="true",slo="both"} 1.0',
            'epd_stage_blocks{role="decode",worker="d0"} 32.0',
            'epd_workers{role="decode"} 1.0',
            'epd_workers_joined_total{role="encode"} 1.0',
        ):
            assert line in text, line


async def test_readiness_names_what_is_missing() -> None:
    async with _gateway() as (made, gateway):
        assert gateway.ready() == (True, "ready")
        await made.lose("e0")
        assert gateway.ready() == (False, "waiting for a worker of: encode")


def test_a_seed_of_a_choice_depends_on_seed_and_index_only() -> None:
    request = GenerateRequest(RequestId("r"), (1,), (), Sampling(seed=2**62))
    seeds = [_with_seed_of(request, index).sampling.seed for index in range(100)]
    assert seeds[0] == 2**62
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
