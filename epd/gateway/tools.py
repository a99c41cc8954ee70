"""The functions that an answer may call instead of ending, and how a call is written.

Of the forms in use this is the one that Qwen's chat templates teach (it goes back to the Hermes models): a JSON object with
`name` and `arguments` between two tags. `epd/gateway/speech` reads it, `epd/gateway/guide` has outputs follow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

OPENING = "<tool_call>"
CLOSING = "</tool_call>"
# Around the arguments, as the templates write it: an output that is guided is to look like what the model has learned.
BEFORE_NAME = '\n{"name": '
BEFORE_ARGUMENTS = ', "arguments": '
AFTER_ARGUMENTS = "}\n"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function of the client's."""

    name: str
    schema: str  # of its arguments: a JSON schema as text
    is_strict: bool  # its arguments have to follow the schema
    description: Mapping[str, object]  # as the chat template takes it
    param: str  # where the request has it


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of functions."""

    described: tuple[Tool, ...]  # all that the prompt tells the model of
    callable: tuple[Tool, ...]  # one of them, where the request names it, else all
    must_call: bool
    is_parallel: bool  # several calls in one answer

    @property
    def need_guide(self) -> bool:
        """Whether the model cannot be left to itself."""
        return self.must_call or not self.is_parallel or any(tool.is_strict for tool in self.callable)


def written(name: str, arguments: Mapping[str, object]) -> str:
    """A call as a model writes it."""
    parts = (OPENING, BEFORE_NAME, json.dumps(name), BEFORE_ARGUMENTS, json.dumps(arguments, ensure_ascii=False), AFTER_ARGUMENTS)
    return "".join((*parts, CLOSING))
