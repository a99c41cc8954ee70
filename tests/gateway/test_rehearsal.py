"""Grammars are tried where that does no harm: what they cost, and that what nobody could follow is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import count

import msgspec
import pytest

from epd.gateway.guide import Guide, grammar_of
from epd.gateway.rehearsal import MAX_CPU_S, MAX_MEMORY_BYTES, Ask, Grammar, Wrong, main, rehearse
from epd.gateway.tools import Tool, Tools

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}
LIKELY = [
    Guide("schema", json.dumps(PERSON), "f"),
    Guide("schema", '{"type": "object"}', "f"),
    Guide("schema", json.dumps({"type": "array", "items": PERSON, "minItems": 3}), "f"),
    Guide("schema", json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}), "f"),
    Guide("regex", r"\d{3}-\d{4}", "f"),
    Guide("regex", r"([a-z ]{20,40}\. ){80}", "f"),
    Guide("choice", json.dumps([f"choice {i}" for i in range(1000)]), "f"),
]


@pytest.mark.parametrize("guide", LIKELY)
def test_what_people_ask_for_comes_through(guide: Guide) -> None:
    assert rehearse(Ask(guide, None)) == Grammar(grammar_of(guide))


def test_so_do_calls_of_many_functions() -> None:
    tools = tuple(Tool(f"f{i}", json.dumps(PERSON), True, {}, f"tools[{i}].function") for i in range(60))
    given = Tools((), tools, must_call=True, is_parallel=True)
    assert rehearse(Ask(None, given)) == Grammar(grammar_of(None, given))


def test_a_free_answer_needs_no_grammar() -> None:
    assert rehearse(Ask(None, None)) == Grammar("")


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide("regex", "(a", "f"), "unclosed group"),
        (Guide("regex", r"[^\s\S]", "f"), "cannot be followed"),
        (Guide("regex", "[a&&b]", "f"), "cannot be followed"),
        (Guide("schema", '{"$ref": "#"}', "f"), "cannot be followed"),
        (Guide("regex", "((.{1,100}){1,100}){1,100}", "f"), "too many"),
        (Guide("schema", '{"type": "integer", "multipleOf": 999999937}', "f"), "fuel"),
    ],
)
def test_what_nobody_could_follow_is_refused_with_the_reason(guide: Guide, words: str) -> None:
    answer = rehearse(Ask(guide, None))
    assert isinstance(answer, Wrong)
    assert answer.param == "f"
    assert words in answer.message
    assert answer.message.startswith("f")


def test_what_takes_long_or_much_is_refused() -> None:
    def stepping(step: float) -> Iterator[float]:
        return (index * step for index in count())

    times, sizes = stepping(MAX_CPU_S / 3), stepping(MAX_MEMORY_BYTES / 3)
    slow = rehearse(Ask(LIKELY[0], None), cpu_s=lambda: next(times), memory_bytes=lambda: 0)
    large = rehearse(Ask(LIKELY[0], None), cpu_s=lambda: 0.0, memory_bytes=lambda: int(next(sizes)))
    assert isinstance(slow, Wrong)
    assert isinstance(large, Wrong)
    assert "too long" in slow.message
    assert "too much memory" in large.message


def test_each_line_is_answered_with_a_line() -> None:
    asks = [Ask(LIKELY[0], None), Ask(Guide("regex", "(", "x"), None), Ask(LIKELY[4], None)]
    answers = io.BytesIO()
    main(io.BytesIO(b"".join(msgspec.json.encode(ask) + b"\n" for ask in asks)), answers)
    lines = answers.getvalue().splitlines()
    found = [msgspec.json.decode(line, type=Grammar | Wrong) for line in lines]
    assert found == [rehearse(ask) for ask in asks]
    assert [type(answer) for answer in found] == [Grammar, Wrong, Grammar]
