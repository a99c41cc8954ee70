from __future__ import annotations

import json
from typing import Any

import pytest

from epd.errors import BadRequest
from epd.gateway.tools import Tools
from epd.http.fields import MAX_DEPTH, Fields
from epd.http.tools import MAX_TOOLS, parse_tools

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "weather", **changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Looks it up", "parameters": CITY, **changes}}


def parsed(**fields: Any) -> Tools | None:
    left = Fields(fields)
    tools = parse_tools(left)
    left.refuse_rest({})
    return tools


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": {}}, "tools", "must be an array"),
        ({"tools": [tool(f"f{index}") for index in range(MAX_TOOLS + 1)]}, "tools", "129 functions; at most 128"),
        ({"tools": ["weather"]}, "tools[0]", "must be a JSON object"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", 'must be "function"'),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{**tool(), "x": 1}]}, "tools[0].x", "not supported"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
        ({"tools": [tool("what is")]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", 'is "weather", as that of another tool'),
        ({"tools": [tool(description=3)]}, "tools[0].function.description", "must be a string"),
        ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters", "a JSON schema of an object"),
        ({"tools": [tool(parameters=nested(MAX_DEPTH + 1))]}, "tools[0].function.parameters", "more than 100 levels"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "true or false"),
        ({"tools": [tool(examples=[])]}, "tools[0].function.examples", "not supported"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice", '"required" or'),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", '"required" or'),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice", '"time", which'),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice", "there are no tools"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parsed(**fields)
    assert (caught.value.param, words in caught.value.message) == (param, True), caught.value.message


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [tool()], "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_where_nothing_may_be_called_there_are_no_tools(fields: dict[str, Any]) -> None:
    assert parsed(**fields) is None


@pytest.mark.parametrize(
    ("fields", "names", "must_call", "is_parallel", "need_guide"),
    [
        ({}, ["weather", "time"], False, True, False),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["weather", "time"], False, False, True),
        ({"tool_choice": "required"}, ["weather", "time"], True, True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, ["time"], True, False, True),
        ({"tools": [tool("weather"), tool("time", strict=True)]}, ["weather", "time"], False, True, True),
    ],
)
def test_what_may_be_called(
    fields: dict[str, Any], names: list[str], must_call: bool, is_parallel: bool, need_guide: bool
) -> None:
    tools = parsed(**{"tools": [tool("weather"), tool("time")], **fields})
    assert tools is not None
    assert [each.name for each in tools.described] == ["weather", "time"]
    assert [each.name for each in tools.callable] == names
    assert (tools.must_call, tools.is_parallel, tools.need_guide) == (must_call, is_parallel, need_guide)


def test_a_template_gets_what_models_have_learned_and_no_more() -> None:
    tools = parsed(tools=[tool(strict=True), {"type": "function", "function": {"name": "now"}}])
    assert tools is not None
    first, second = tools.described
    assert first.description == {
        "type": "function",
        "function": {"name": "weather", "description": "Looks it up", "parameters": CITY},
    }
    assert second.description == {"type": "function", "function": {"name": "now"}}
    assert json.loads(first.schema) == CITY
    assert json.loads(second.schema)["properties"] == {}
    assert parsed(tools=[tool(parameters=nested(MAX_DEPTH))]) is not None
