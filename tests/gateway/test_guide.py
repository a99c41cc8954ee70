"""What an output is to look like, as clients say it. That outputs do look like it is tests/model/test_guides.py's."""

from __future__ import annotations

import json

import pytest

from epd.errors import BadRequest
from epd.gateway.guide import MAX_GUIDE_CHARS, Guide, grammar_of


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
