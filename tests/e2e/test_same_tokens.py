"""The tokens of a request do not depend on where it is computed, with whom, in which pieces and over which way its bytes move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from epd.cluster.cpu_stack import CpuStack
from epd.options import BUNDLED_MODEL
from tests.e2e.mix import Case, Said, ask_at_once, ask_one_by_one, cases
from tests.support.cluster import ALL_ROLES, APART, NodeCluster, ProcessCluster, node_cluster, process_cluster
from tests.support.systems import media
from tools.tiny_model.reference import Reference

MAX_LOGPROB_ERROR = 2e-4
# A pool of 56 blocks, where the mix holds hundreds, and two blocks for all embeddings.
TIGHT = ("--kv-mib", "1.75", "--max-model-len", "832", "--embedding-mib", "0.2")


def check(got: Sequence[Said], wanted: Sequence[Said], of: Sequence[Case]) -> None:
    for case, said, should in zip(of, got, wanted, strict=True):
        assert said == should, case.name
        for one, other in zip(said.choices, should.choices, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=MAX_LOGPROB_ERROR), case.name


async def check_cold_and_warm(url: str, wanted: Sequence[Said], *, is_roomy: bool = False) -> None:
    """All at once with nothing cached; again with everything cached that fits; then alone, one after the other.

    `is_roomy`: the pools hold the whole mix, so the second time must find more than the first. Small ones may have evicted it.
    """
    check(await ask_at_once(url, cases()), wanted, cases())
    warm = await ask_at_once(url, cases())
    check(warm, wanted, cases())
    if is_roomy:
        assert sum(said.num_cached_tokens for said in warm) > sum(said.num_cached_tokens for said in wanted)
    check(await ask_one_by_one(url, cases()[::3]), wanted[::3], cases()[::3])


async def rungs(cluster: NodeCluster) -> set[tuple[str, str]]:
    """(role, rung) of all that was pulled."""
    workers = (await cluster.cluster())["workers"]
    return {(worker["roles"][-1], link["rung"]) for worker in workers for link in worker["links"] if link["num_transfers"]}


# --- the reference --------------------------------------------------------------------------------------------------


class Greedy(Reference):
    """transformers' generate on the bundled checkpoint."""

    @torch.no_grad()
    def text(self, body: dict[str, Any]) -> str:
        inputs = self.inputs(body["messages"])
        ends = {"eos_token_id": None} if body.get("ignore_eos") else {}
        tokens = self._model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0, **ends)
        return str(self._tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@cache
def greedy() -> Greedy:
    return Greedy(BUNDLED_MODEL)


NOT_GREEDY = {"stop", "logit_bias", "response_format", "structured_outputs"}  # bodies that say what may be drawn, or end early


def greedy_cases(answers: Sequence[Said]) -> list[tuple[Case, Said]]:
    """Those of the mix that transformers can be asked for."""
    found = [
        (case, said)
        for case, said in zip(cases(), answers, strict=True)
        if case.is_greedy and case.route == "chat/completions" and not NOT_GREEDY & case.body.keys()
    ]
    assert len(found) >= 15
    return found


def test_greedy_output_is_that_of_transformers(undisturbed: Sequence[Said]) -> None:
    for case, said in greedy_cases(undisturbed):
        assert said.choices[0].text == greedy().text(case.body), case.name


# --- nodes in this process ------------------------------------------------------------------------------------------

ONE_PROCESS = (
    ("--block-size", "8", "--max-chunk-tokens", "16"),
    ("--block-size", "32", "--max-chunk-tokens", "4096", "--token-budget", "4096"),
    ("--max-chunk-tokens", "48", "--max-running", "5"),
    TIGHT,
)


@pytest.mark.parametrize("options", ONE_PROCESS, ids=" ".join)
async def test_one_process_where_tables_move(undisturbed: Sequence[Said], options: Sequence[str]) -> None:
    async with node_cluster((ALL_ROLES,), *options) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed, is_roomy=options is not TIGHT)
        await cluster.idle()
        workers = (await cluster.cluster())["workers"]
        assert {link["rung"] for worker in workers for link in worker["links"]} == {"local"}


NODES_APART = (
    ("mapped", ("--transfer", "mapped", "--max-chunk-tokens", "16")),
    ("mapped", ("--block-size", "8", "--max-chunk-tokens", "4096", "--token-budget", "4096")),
    ("socket", ("--transfer", "socket", "--max-chunk-tokens", "64")),
    ("mapped", TIGHT),
    ("socket", (*TIGHT, "--transfer", "socket", "--max-chunk-tokens", "16", "--token-budget", "64")),
)


@pytest.mark.parametrize(("rung", "options"), NODES_APART, ids=lambda value: value if isinstance(value, str) else " ".join(value))
async def test_nodes_apart(undisturbed: Sequence[Said], rung: str, options: Sequence[str]) -> None:
    async with node_cluster(APART, *options) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed, is_roomy="--kv-mib" not in options)
        await cluster.idle()
        assert await rungs(cluster) == {("prefill", rung), ("decode", rung)}
        if rung == "socket":
            systems = [member.node.system for member in cluster.members if member.node.system is not None]
            assert {medium for system in systems for medium in media(system).values()} == {"tcp"}


ONE_STEP_AHEAD = (
    ((ALL_ROLES,), ("--block-size", "8", "--max-chunk-tokens", "16")),
    ((ALL_ROLES,), TIGHT),
    (APART, (*TIGHT, "--max-chunk-tokens", "16", "--token-budget", "64")),
)


@pytest.mark.parametrize(("layout", "options"), ONE_STEP_AHEAD, ids=" ".join)
async def test_with_a_step_in_flight_behind_the_one_that_runs(
    undisturbed: Sequence[Said], layout: Sequence[str], options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuStack, "steps_in_flight", 2)
    async with node_cluster(layout, *options) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed)
        await cluster.idle()


SEVERAL_STAGES = (
    ("gateway,encode", "prefill,decode", "prefill,decode", "decode"),
    ("gateway", *["encode,prefill,decode"] * 3),
)


@pytest.mark.parametrize("layout", SEVERAL_STAGES, ids=" ".join)
async def test_workers_that_prefill_and_decode(undisturbed: Sequence[Said], layout: Sequence[str]) -> None:
    """Some handoffs move a table, others copy blocks, into pools that prefill uses too."""
    async with node_cluster(layout, *TIGHT, "--max-chunk-tokens", "32", "--budget-beside-decode", "40") as cluster:
        await check_cold_and_warm(cluster.url, undisturbed)
        await cluster.idle()
        assert await rungs(cluster) >= {("decode", "local"), ("decode", "mapped")}


@pytest.mark.parametrize("layout", SEVERAL_STAGES, ids=" ".join)
async def test_a_crowd_that_waits_for_each_others_blocks_gets_through(undisturbed: Sequence[Said], layout: Sequence[str]) -> None:
    """Each worker soon holds blocks for prompts that others compute, and lacks some for its own."""
    crowd, wanted = cases() * 6, [*undisturbed] * 6
    async with node_cluster(layout, *TIGHT, "--max-chunk-tokens", "32", "--max-requests", "1000") as cluster:
        check(await ask_at_once(cluster.url, crowd), wanted, crowd)
        await cluster.idle()


@pytest.mark.parametrize("layout", [(ALL_ROLES,), APART], ids=["together", "apart"])
async def test_preempted_requests_go_on_with_the_same_tokens(layout: Sequence[str]) -> None:
    """Short prompts with long outputs, which the pool cannot hold all at once."""
    long = [
        replace(case, body={**case.body, "max_tokens": 150, "ignore_eos": True}) for case in cases() if "text" in case.name
    ] + [replace(case, body={**case.body, "max_tokens": 150}) for case in cases() if case.name.startswith("seeded")]
    async with node_cluster((ALL_ROLES,)) as cluster:
        wanted = await ask_one_by_one(cluster.url, long)
    async with node_cluster(layout, *TIGHT) as cluster:
        check(await ask_at_once(cluster.url, long), wanted, long)
        await cluster.idle()
        assert sum(stage.load().num_preemptions for stage in cluster.stages()) > 0


# --- processes ------------------------------------------------------------------------------------------------------


async def test_processes_over_mapped_memory(undisturbed: Sequence[Said], cluster: ProcessCluster) -> None:
    await check_cold_and_warm(cluster.url, undisturbed, is_roomy=True)
    cluster.wait_until_idle()
    assert cluster.rungs() == {("prefill", "mapped"), ("decode", "mapped")}


async def test_processes_over_tcp(undisturbed: Sequence[Said]) -> None:
    options = ("--transfer", "socket", "--max-chunk-tokens", "32", "--block-size", "32")
    with process_cluster(*options, encode=1, prefill=2, decode=2) as cluster:
        await check_cold_and_warm(cluster.url, undisturbed, is_roomy=True)
        cluster.wait_until_idle()
        assert cluster.rungs() == {("prefill", "socket"), ("decode", "socket")}
