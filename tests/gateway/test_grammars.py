"""The process behind the gateway's grammars: asked once for each, killed when it does not answer, started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest

from epd.errors import BadRequest, Overloaded
from epd.gateway.grammars import Grammars
from epd.gateway.guide import Guide, grammar_of
from epd.gateway.tools import Tool, Tools

EASY = Guide("regex", "a+", "f")
# Takes longer than anybody has time.
ENDLESS = Guide("schema", json.dumps({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(25)]}), "f")


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "epd.gateway.rehearsal" in child.cmdline()]


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars()
    yield made
    await made.close()
    assert children() == []


async def test_a_grammar_is_made_once(grammars: Grammars) -> None:
    assert await grammars.grammar(EASY, None) == grammar_of(EASY)
    (child,) = children()
    os.kill(child.pid, signal.SIGSTOP)  # nobody is asked again
    assert await grammars.grammar(EASY, None) == grammar_of(EASY)


async def test_what_is_free_starts_nothing(grammars: Grammars) -> None:
    tool = Tool("f", "{}", False, {"a": 1}, "tools[0].function")
    assert await grammars.grammar(None, None) == ""
    assert await grammars.grammar(None, Tools((tool,), (tool,), must_call=False, is_parallel=True)) == ""
    assert children() == []
    must = Tools((tool,), (tool,), must_call=True, is_parallel=True)
    assert await grammars.grammar(None, must) == grammar_of(None, must)


async def test_a_bad_form_is_the_clients_fault_each_time(grammars: Grammars) -> None:
    for _ in range(2):
        with pytest.raises(BadRequest, match="unclosed group") as caught:
            await grammars.grammar(Guide("regex", "(a", "structured_outputs.regex"), None)
        assert caught.value.param == "structured_outputs.regex"


async def test_what_takes_too_long_is_killed_and_others_are_served() -> None:
    grammars = Grammars(max_rehearsal_s=1.0)
    try:
        bad = asyncio.create_task(grammars.grammar(ENDLESS, None))
        await asyncio.sleep(0)
        assert await grammars.grammar(EASY, None) == grammar_of(EASY)
        with pytest.raises(BadRequest, match="takes too long") as caught:
            await bad
        assert caught.value.param == "f"
    finally:
        await grammars.close()
    assert children() == []


async def test_who_has_to_wait_too_long_is_told_to_come_back() -> None:
    grammars = Grammars(max_rehearsal_s=60.0, max_wait_s=0.05)
    try:
        bad = asyncio.create_task(grammars.grammar(ENDLESS, None))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await grammars.grammar(EASY, None)
        bad.cancel()
        await asyncio.gather(bad, return_exceptions=True)
        assert await grammars.grammar(EASY, None) == grammar_of(EASY)  # not the answer that was still to come
    finally:
        await grammars.close()


async def test_a_process_that_has_died_is_started_again(grammars: Grammars) -> None:
    assert await grammars.grammar(EASY, None)
    (child,) = children()
    child.kill()
    child.wait()
    other = Guide("regex", "b+", "f")
    try:
        assert await grammars.grammar(other, None) == grammar_of(other)
    except BadRequest:  # its death was not heard of yet: the next one is served
        assert await grammars.grammar(Guide("regex", "c+", "f"), None)
