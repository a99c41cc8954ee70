"""What an output is to look like, as clients say it. That outputs do look like it is tests/model/test_guides.py's."""

from __future__ import annotations

import json

import pytest

from epd.errors import BadRequest
from epd.gateway.guide import MAX_GUIDE_CHARS, Guide, after_thoughts, grammar_of
from epd.gateway.speech import Thinking
from epd.gateway.tools import Tool, Tools


@pytest.mark.parametrize(
    "guide",
    [
        Guide("schema", '{"type": "object"}', "f"),
        Guide("schema", json.dumps({"type": "object", "properties": {"a": {"enum": [1, "x", None]}}, "required": ["a"]}), "f"),
        Guide("schema", "{}", "f"),
        Guide("regex", r"\d{3}-\d{4}", "f"),
        Guide("choice", json.dumps(['yes "really"', "no\\", "vielleicht, süß", "/*", "b|c"]), "f"),
    ],
)
def test_what_can_be_followed_becomes_a_grammar(guide: Guide) -> None:
    assert grammar_of(guide)


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (Guide("schema", '{"type": "objekt"}', "response_format.json_schema.schema"), "objekt"),
        (Guide("schema", '{"$ref": "#/nowhere"}', "f"), "nowhere"),
        (Guide("schema", '{"type": "string", "minLength": 5, "maxLength": 3}', "f"), "minLength"),
        (Guide("regex", "(a", "structured_outputs.regex"), "unclosed group"),
        (Guide("regex", r"(?=a)b", "f"), "look"),
        (Guide("regex", "a" * (MAX_GUIDE_CHARS + 1), "f"), "characters"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_a_reason(guide: Guide, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as caught:
        grammar_of(guide)
    assert caught.value.param == guide.param
    assert guide.param in str(caught.value)


def tool(name: str, schema: str = "{}", *, is_strict: bool = False) -> Tool:
    return Tool(name, schema, is_strict, {}, f"tools[{name}].function")


def test_a_free_answer_has_no_grammar() -> None:
    assert grammar_of(None) == ""
    assert grammar_of(None, Tools((tool("f"),), (tool("f"),), must_call=False, is_parallel=True)) == ""
    assert after_thoughts("", Thinking.BEGUN) == ""
    grammar = grammar_of(Guide("regex", "a", "f"))
    assert after_thoughts(grammar, Thinking.NONE) == grammar


def test_only_who_asks_for_it_is_held_to_a_schema_that_cannot_be_followed() -> None:
    bad = '{"type": "objekt"}'
    for is_strict in (False, True):
        tools = Tools((), (tool("good"), tool("f", bad, is_strict=is_strict)), must_call=True, is_parallel=True)
        if not is_strict:
            assert grammar_of(None, tools)
            continue
        with pytest.raises(BadRequest, match="objekt") as caught:
            grammar_of(None, tools)
        assert caught.value.param == "tools[f].function.parameters"


def test_many_schemas_together_are_bounded_too() -> None:
    large = json.dumps({"description": "x" * (MAX_GUIDE_CHARS // 2)})
    tools = Tools((), (tool("f", large), tool("g", large)), must_call=True, is_parallel=True)
    with pytest.raises(BadRequest, match="longer than") as caught:
        grammar_of(None, tools)
    assert caught.value.param == "tools"
