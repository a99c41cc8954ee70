"""Journeys through whole clusters: the tokens are those of the prompt, whatever the topology and whatever fails on the way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest

from epd.errors import BadImage, DeadlineExceeded, GuideTooComplex, InternalError
from epd.gateway.fleet import Placed
from epd.gateway.journey import State
from epd.microkernel.actor import Mail
from epd.request import GenerateRequest
from epd.timeline import Timeline
from gpu.errors import DeviceFailed, OutOfMemory
from gpu.pool import Scratch
from protocol.messages import RequestId, TokenStep
from tests.support.stages import ROWS, expected_tokens, with_images
from tests.support.systems import until
from tests.support.world import World, together, world

ONE = {"gateway": "encode,prefill,decode"}
THREE = {"e0": "encode", "p0": "prefill", "d0": "decode"}
MANY = {"e0": "encode", "e1": "encode", "p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
PROMPT = list(range(100, 123))
PICTURES = [b"a red one", b"a blue one"]


def _with_pictures(made: World, max_tokens: int = 6) -> tuple[GenerateRequest, list[int]]:
    request = made.request(PROMPT, max_tokens, images=PICTURES, offsets=[2, 14])
    seen = with_images(PROMPT, [image.item for image in request.images], PICTURES)
    return request, expected_tokens(seen, max_tokens)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize(("layout", "allowed"), [(ONE, "auto"), (THREE, "mapped"), (THREE, "socket"), (MANY, "auto")])
async def test_the_tokens_are_the_same_on_every_topology(
    layout: dict[str, str], allowed: str, chunk: int, in_flight: int
) -> None:
    async with world(layout, allowed=allowed, chunk=chunk, in_flight=in_flight) as made:
        text = made.request(PROMPT, 9, seed=3)
        pictured, due = _with_pictures(made)
        again, _ = _with_pictures(made)
        results = await together(made.run(text), made.run(pictured), made.run(again))
        assert results == [expected_tokens(PROMPT, 9, seed=3), due, due]
        assert await made.run(_with_pictures(made)[0]) == due  # caches warm
        assert all((stage.runner.num_ahead > 0) == (in_flight > 1) for stage in made.decode.values() if stage.runner.num_steps)


async def test_in_one_process_the_table_moves_and_no_byte_does() -> None:
    async with world(ONE) as made:
        await made.run(made.request(PROMPT, 5))
        (link,) = made.decode["gateway"].actor.links()
        assert (link.rung, link.num_bytes) == ("local", 0)
        assert link.num_transfers > 0


@pytest.mark.parametrize(("allowed", "rung"), [("auto", "mapped"), ("socket", "socket")])
async def test_the_rung_is_the_best_that_is_allowed(allowed: str, rung: str) -> None:
    async with world(THREE, allowed=allowed) as made:
        await made.run(_with_pictures(made)[0])
        for stage in (made.prefill["p0"], made.decode["d0"]):
            (link,) = stage.actor.links()
            assert link.rung == rung
            assert link.num_bytes > 0


async def test_one_token_needs_no_decode_worker() -> None:
    async with world(THREE) as made:
        assert await made.run(made.request(PROMPT, 1)) == expected_tokens(PROMPT, 1)
        assert made.decode["d0"].runner.num_steps == 0


async def test_prefill_starts_before_the_embeddings_are_there() -> None:
    async with world(THREE, chunk=4) as made:
        gate = made.encode["e0"].runner.gate
        gate.clear()
        prompt = list(range(200, 240))
        request = made.request(prompt, 4, images=PICTURES[:1], offsets=[20])
        running = asyncio.create_task(made.run(request))
        await until(lambda: made.prefill["p0"].runner.num_steps >= 5)  # 20 tokens before the image, 4 a step
        assert not running.done()
        gate.set()
        seen = with_images(prompt, [request.images[0].item], PICTURES[:1])
        assert await running == expected_tokens(seen, 4)


@pytest.mark.parametrize("layout", [ONE, MANY])
async def test_a_timeline_tells_of_every_stage(layout: dict[str, str]) -> None:
    async with world(layout, chunk=4) as made:
        request, due = _with_pictures(made)
        timeline = Timeline()
        assert await made.run(dataclasses.replace(request, timeline=timeline)) == due
        took_s, spans = timeline.now(), timeline.spans()
    names = Counter(span.name for span in spans)
    assert {name: names[name] for name in ("placement", "encode", "embedding transfer", "prefill", "transfer", "decode")} == {
        "placement": 1, "encode": 2, "embedding transfer": 2, "prefill": 1, "transfer": 1, "decode": 1,
    }  # fmt: skip
    assert names["prefill chunk"] >= 23 // 4
    assert all(0 <= span.start_s <= span.end_s <= took_s for span in spans)
    assert all(layout[span.worker] for span in spans if span.stage not in ("gateway", "http"))
    prefill = next(span for span in spans if span.name == "prefill")
    chunks = [span for span in spans if span.name == "prefill chunk"]
    assert all(before.end_s <= after.start_s for before, after in pairwise(chunks))
    assert all(prefill.start_s <= chunk.start_s and chunk.end_s <= prefill.end_s for chunk in chunks)


async def test_what_prefill_waited_for_shows() -> None:
    async with world(THREE, chunk=4) as made:
        gate = made.encode["e0"].runner.gate
        gate.clear()
        prompt = list(range(200, 240))
        timeline = Timeline()
        request = made.request(prompt, 4, images=PICTURES[:1], offsets=[20])
        running = asyncio.create_task(made.run(dataclasses.replace(request, timeline=timeline)))
        await until(lambda: made.prefill["p0"].runner.num_steps >= 5)
        gate.set()
        await running
    (waited,) = (span for span in timeline.spans() if span.name == "wait for embedding")
    chunks = [span for span in timeline.spans() if span.name == "prefill chunk"]
    assert waited.start_s == chunks[4].end_s
    assert waited.end_s <= chunks[5].start_s


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("after", [0, 1, 4])
async def test_a_lost_worker_costs_no_token(role: str, after: int) -> None:
    """The worker dies after `after` tokens of the stream; another one goes on."""
    async with world(MANY) as made:
        request, due = _with_pictures(made, 12)
        got: list[int] = []
        async with aclosing(made.journey(request).tokens()) as outputs:
            if after == 0:
                await made.lose(f"{role[0]}0")
            async for output in outputs:
                got.append(output.token.token_id)
                if len(got) == after:
                    busy = [name for name, stage in made.decode.items() if not stage.actor.is_idle()]
                    await made.lose(busy[0] if role == "decode" and busy else f"{role[0]}0")
        assert got == due


@pytest.mark.parametrize("lost", [2, 5, 11], ids=["second", "inner", "last"])
async def test_tokens_that_are_not_delivered_are_missed(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mailbox of the gateway stays full once: the step's tokens are dropped, with those of all other requests."""
    monkeypatch.setattr("epd.gateway.attempt.LATE_TOKENS_S", 0.05)
    async with world(MANY) as made:
        original = made.router.receive
        dropped: list[int] = []

        async def receive(mail: Mail) -> None:
            assert isinstance(mail.message, TokenStep)
            indexes = [index for _, epoch, index, _ in mail.message.tokens if epoch == 1]
            if lost in indexes:
                dropped.extend(indexes)
                return
            await original(mail)

        monkeypatch.setattr(made.router, "receive", receive)
        assert await made.run(made.request(PROMPT, 12)) == expected_tokens(PROMPT, 12)
        assert lost in dropped


async def test_a_lost_encode_worker_costs_no_image() -> None:
    async with world(MANY) as made:
        for stage in made.encode.values():
            stage.runner.gate.clear()
        request, due = _with_pictures(made)
        running = asyncio.create_task(made.run(request))
        await until(lambda: sum(not stage.actor.is_idle() for stage in made.encode.values()) == 2)
        for stage in made.encode.values():
            stage.runner.gate.set()
        await made.lose("e0")
        assert await running == due


async def test_an_evicted_embedding_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world({**THREE, "e1": "encode"}) as made:
        fetcher = made.prefill["p0"].actor._fetcher
        original = fetcher.fetch
        lost: list[str] = []

        async def fetch(ref, source, item):  # type: ignore[no-untyped-def]
            if not lost:
                lost.append(ref.mm_hash)
                stage = made.encode[source.worker]
                stage.cache.release(ref.lease_id)
                assert stage.cache.reserve("another", stage.cache.num_free_blocks * ROWS) is not None
                stage.cache.fail("another")
                stage.memory.blocks[:] = 255  # somebody else's rows by now
            return await original(ref, source, item)

        monkeypatch.setattr(fetcher, "fetch", fetch)
        request, due = _with_pictures(made)
        assert await made.run(request) == due
        assert len(lost) == 1
        failed = [(span.name, span.stage) for span in request.timeline.spans() if span.name.startswith("failed")]
        assert failed == [("failed: corrupt_transfer", "encode")]


@pytest.mark.parametrize("allowed", ["mapped", "socket"])
async def test_corrupt_kv_is_refused_and_prefilled_again(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(THREE, allowed=allowed, chunk=64) as made:  # one step, so that prefill itself does not read what is spoilt
        memory = made.prefill["p0"].memory
        original = memory.checksum
        corrupted: list[int] = []

        def checksum(ids):  # type: ignore[no-untyped-def]
            sums = original(ids)
            if not corrupted:
                corrupted.append(ids[0])
                memory.blocks[ids[0]] ^= 1
            return sums

        monkeypatch.setattr(memory, "checksum", checksum)
        placings = _placings(made, monkeypatch)
        # The spoilt block is in the prefix cache: the next attempt must not find it there, nor be sent there for its sake.
        assert await made.run(made.request(PROMPT, 6)) == expected_tokens(PROMPT, 6)
        assert corrupted
        assert [placed.assignments[0].num_cached_tokens for placed in placings] == [0, 0]
        # Nor may anybody else: another request with the same prompt, which has no salt.
        assert await made.run(made.request(PROMPT, 6)) == expected_tokens(PROMPT, 6)


async def test_a_broken_image_ends_the_request_and_says_so() -> None:
    async with world(THREE) as made:
        request = made.request(PROMPT, 6, images=[b"broken", b"fine"], offsets=[2, 14])
        with pytest.raises(BadImage):
            await made.run(request)
        await made.settle()


async def test_a_failing_runner_ends_its_requests_and_not_the_stage() -> None:
    async with world(THREE) as made:
        for stage in (made.prefill["p0"], made.decode["d0"]):
            stage.runner.error = ValueError("out of luck")
            with pytest.raises(InternalError):
                await made.run(made.request(PROMPT, 6))
            stage.runner.error = None
            assert await made.run(made.request(PROMPT, 6)) == expected_tokens(PROMPT, 6)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_of_a_failing_batch_only_the_culprit_ends(role: str) -> None:
    """Six requests are in one step with a seventh that no step can take."""
    prompts = [list(range(number * 100, number * 100 + 7)) for number in range(6)]
    async with world(THREE, decode_blocks=64, prefill_blocks=64) as made:
        (stage,) = getattr(made, role).values()
        requests = [made.request(prompt, 12) for prompt in [*prompts, [1, 2, 3]]]
        stage.runner.gate.clear()
        stage.runner.poison = RequestId(f"{requests[-1].request_id}/0")
        running = [asyncio.create_task(made.run(request)) for request in requests]
        await until(lambda: stage.scheduler.num_running + stage.scheduler.num_waiting == 7)
        stage.runner.gate.set()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert results[:6] == [expected_tokens(prompt, 12) for prompt in prompts]
        assert isinstance(results[6], InternalError)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_what_the_clients_form_makes_impossible_is_the_clients_fault(role: str) -> None:
    async with world(THREE) as made:
        (stage,) = getattr(made, role).values()
        stage.runner.error = GuideTooComplex("the form is too much")
        with pytest.raises(GuideTooComplex, match="the form is too much"):
            await made.run(made.request(PROMPT, 6))


async def test_a_device_that_fails_ends_the_stage_and_its_requests_go_on_elsewhere() -> None:
    async with world(MANY) as made:
        request, due = _with_pictures(made, 12)
        got: list[int] = []
        async with aclosing(made.journey(request).tokens()) as outputs:
            async for output in outputs:
                got.append(output.token.token_id)
                if len(got) == 4:
                    (busy,) = [name for name, stage in made.decode.items() if not stage.actor.is_idle()]
                    made.decode[busy].runner.error = DeviceFailed("an illegal address")
        assert got == due
        assert len(made.decode[busy].scheduler.tables()) > 0  # it stopped as it was: nothing there is worth a try
        await made.lose(busy)


async def test_an_image_waits_while_prefill_has_no_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(THREE) as made:
        fetcher = made.prefill["p0"].actor._fetcher
        allocate = fetcher._allocate
        refused: list[int] = []

        def short(num_blocks: int) -> Scratch:
            if len(refused) < 2:
                refused.append(num_blocks)
                raise OutOfMemory(num_blocks, 0)
            return allocate(num_blocks)

        monkeypatch.setattr(fetcher, "_allocate", short)
        request, due = _with_pictures(made)
        assert await made.run(request) == due
        assert len(refused) == 2
        await made.settle()


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_a_full_decode_pool_preempts_and_alters_nothing(in_flight: int) -> None:
    prompts = [list(range(number * 100, number * 100 + 12)) for number in range(6)]
    async with world(THREE, decode_blocks=16, in_flight=in_flight) as made:
        results = await together(*(made.run(made.request(prompt, 40)) for prompt in prompts))
        assert results == [expected_tokens(prompt, 40) for prompt in prompts]
        assert made.decode["d0"].scheduler.num_preemptions > 0


def _placings(made: World, monkeypatch: pytest.MonkeyPatch) -> list[Placed]:
    """Where attempts are placed, from now on."""
    place, placings = made.fleet.place, []

    async def noted(*args: Any, **options: Any) -> Placed:
        placings.append(await place(*args, **options))
        return placings[-1]

    monkeypatch.setattr(made.fleet, "place", noted)
    return placings


@pytest.mark.parametrize(("role", "expected"), [("prefill", [(0, 0), (0, 0)]), ("decode", [(0, 0), (20, 0)])])
async def test_who_failed_is_not_sent_the_same_prompt_for_its_cache(
    role: str, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(THREE) as made:
        (stage,) = getattr(made, role).values()
        placings = _placings(made, monkeypatch)
        stage.runner.error = ValueError("out of luck")
        with pytest.raises(InternalError):
            await made.run(made.request(PROMPT, 6))
        stage.runner.error = None
        assert await made.run(made.request(PROMPT, 6)) == expected_tokens(PROMPT, 6)
        assert [tuple(work.num_cached_tokens for work in placed.assignments) for placed in placings] == expected


# --- endings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
@pytest.mark.parametrize("layout", [ONE, THREE])
async def test_the_deadline_ends_a_request_in_every_stage(stage: str, layout: dict[str, str]) -> None:
    async with world(layout) as made:
        (blocked,) = getattr(made, stage).values()
        blocked.runner.gate.clear()
        request = made.request(PROMPT, 6, images=PICTURES, offsets=[2, 14], deadline_s=0.3)
        journey = made.journey(request)
        with pytest.raises(DeadlineExceeded):
            async for _ in journey.tokens():
                pass
        assert journey.state is State.FAILED
        blocked.runner.gate.set()
        await made.settle()


@pytest.mark.parametrize("layout", [ONE, THREE])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5])
async def test_whoever_leaves_leaves_nothing_behind(layout: dict[str, str], num_tokens: int) -> None:
    async with world(layout) as made:
        journey = made.journey(_with_pictures(made, 12)[0])
        outputs = journey.tokens()
        if num_tokens == 0:
            first = asyncio.ensure_future(anext(outputs))
            await until(lambda: any(not actor.is_idle() for actor in made.actors))
            first.cancel()
            await asyncio.wait([first])
        for _ in range(num_tokens):
            await anext(outputs)
        await outputs.aclose()
        assert journey.state is State.ABORTED
        await made.settle()
