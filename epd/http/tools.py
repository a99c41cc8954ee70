"""Fields that say which functions an answer may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

import json
import re

from epd.errors import BadRequest, Unsupported
from epd.gateway.tools import Tool, Tools
from epd.http.fields import MAX_DEPTH, Fields, is_deeper

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'


def parse_tools(fields: Fields) -> Tools | None:
    """Takes the three fields; None where nothing may be called. Raises BadRequest and Unsupported, which name the field."""
    items = fields.array("tools") or ()
    if len(items) > MAX_TOOLS:
        raise BadRequest(f"tools holds {len(items)} functions; at most {MAX_TOOLS} are taken", param="tools")
    tools = tuple(_tool(item, f"tools[{index}]") for index, item in enumerate(items))
    names = [tool.name for tool in tools]
    if twice := next((tool for index, tool in enumerate(tools) if tool.name in names[:index]), None):
        raise BadRequest(f"{twice.param}.name is {json.dumps(twice.name)}, as that of another tool", param=f"{twice.param}.name")
    is_parallel = fields.boolean("parallel_tool_calls", True)
    must_call, only = _choice(fields)
    if must_call and not tools:
        raise BadRequest("tool_choice asks for a call, and there are no tools", param="tool_choice")
    if only and only not in names:
        raise BadRequest(f"tool_choice names {json.dumps(only)}, which is none of the tools", param="tool_choice")
    if not tools or must_call is None:
        return None
    chosen = tuple(tool for tool in tools if tool.name == only) if only else tools
    # A function that is named is called once, as OpenAI's API has it.
    return Tools(tools, chosen, must_call, is_parallel and not only)


def function_name(function: Fields) -> str:
    name = function.require("name", what="the function's name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise function.wrong("name", "1 to 64 letters, digits, underscores, dots or dashes", name)
    return name


def _tool(value: object, path: str) -> Tool:
    fields = Fields(value, path)
    tool_type = fields.string("type")
    if tool_type != "function":
        raise Unsupported(f'{fields.path("type")} must be "function"', param=fields.path("type"))
    function = Fields(fields.require("function", what="an object with a name"), fields.path("function"))
    fields.refuse_rest({})
    name = function_name(function)
    description = function.string("description")
    parameters = function.take("parameters")
    is_strict = function.boolean("strict", False)
    function.refuse_rest({})
    path = fields.path("function")
    if parameters is not None and not isinstance(parameters, dict):
        raise function.wrong("parameters", "a JSON schema of an object", parameters)
    if is_deeper(parameters, MAX_DEPTH):
        raise BadRequest(f"{path}.parameters is nested more than {MAX_DEPTH} levels deep", param=f"{path}.parameters")
    given = {"name": name, "description": description, "parameters": parameters}
    return Tool(
        name=name,
        schema=json.dumps({**_NO_PARAMETERS, "additionalProperties": False} if parameters is None else parameters),
        is_strict=is_strict,
        description={"type": "function", "function": {key: item for key, item in given.items() if item is not None}},
        param=path,
    )


def _choice(fields: Fields) -> tuple[bool | None, str]:
    """Whether a function must be called (None: none may be), and the one that it has to be."""
    value = fields.take("tool_choice")
    if isinstance(value, dict):
        named = Fields(value, "tool_choice")
        if named.string("type") != "function":
            raise Unsupported(f"tool_choice must be {_CHOICES}", param="tool_choice")
        function = Fields(named.require("function", what="an object with a name"), "tool_choice.function")
        named.refuse_rest({})
        only = function_name(function)
        function.refuse_rest({})
        return True, only
    if value not in (None, "none", "auto", "required"):
        raise fields.wrong("tool_choice", _CHOICES, value)
    return (None if value == "none" else value == "required"), ""
