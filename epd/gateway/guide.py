"""What an output is to look like, as clients say it, becomes a grammar that the stages follow.

Grammars are llguidance's: a list, of which the first is where an output begins and refers to others by name, spelled as one
string. What cannot be followed is refused here, before any work is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from epd.errors import BadRequest
from epd.gateway.speech import THINK, THINK_END, Thinking
from epd.gateway.tools import AFTER_ARGUMENTS, BEFORE_ARGUMENTS, BEFORE_NAME, CLOSING, OPENING, Tool, Tools

MAX_GUIDE_CHARS = 64 * 1024
_ANY_OBJECT = '{"type": "object"}'
_AFTER_THOUGHTS = "\n\n"  # as models are taught
_TEXT = r"TEXT: /(.|\n)*/"

_Grammar = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Guide:
    """`value`: a JSON schema as text, a regular expression in Rust's syntax, or a JSON array of the texts to choose from."""

    kind: Literal["schema", "regex", "choice"]
    value: str
    param: str  # where the request says so


def grammar_of(guide: Guide | None, tools: Tools | None = None) -> str:
    """`Sampling.guide` for answers that follow the guide or call tools; empty for those that are free.

    What it takes is not bounded: `epd/gateway/grammars` has it done where that does no harm.

    Raises:
        BadRequest: nothing can follow it, or it is too large; says why.
    """
    answer = [] if guide is None else [_named("answer", guide.kind, guide.value, guide.param)]
    if tools is None or not (answer or tools.need_guide):
        grammars = answer
    else:
        grammars = _calls(tools, [] if tools.must_call else answer)
    return _spelled(grammars)


def after_thoughts(grammar: str, thinking: Thinking) -> str:
    """The grammar of outputs that begin with thoughts, which are free, and then follow `grammar`."""
    if not grammar or thinking is Thinking.NONE:
        return grammar
    grammars = json.loads(grammar)["grammars"]
    thoughts = f"thoughts {_quoted(_AFTER_THOUGHTS)}"
    start = thoughts if thinking is Thinking.BEGUN else f"({_quoted(THINK)} {thoughts})?"
    rules = [f"start: {start} @{grammars[0]['name']}", f"thoughts[suffix={_quoted(THINK_END)}]: TEXT", _TEXT]
    return _spelled([_lark("whole", rules), *grammars])


def _calls(tools: Tools, answer: Sequence[_Grammar]) -> list[_Grammar]:
    """Calls; or, where none must be made, what `answer` has, else any text and calls in it."""
    arguments = [_arguments(f"arguments_{number}", tool) for number, tool in enumerate(tools.callable)]
    if sum(len(tool.schema) for tool in tools.callable) > MAX_GUIDE_CHARS:
        raise BadRequest(f"the tools' parameters are longer than {MAX_GUIDE_CHARS} characters together", param="tools")
    heads = [_quoted(BEFORE_NAME + json.dumps(tool.name) + BEFORE_ARGUMENTS) for tool in tools.callable]
    bodies = [f"{head} @arguments_{number} {_quoted(AFTER_ARGUMENTS + CLOSING)}" for number, head in enumerate(heads)]
    rules = [f"body: {' | '.join(f'body_{number}' for number in range(len(bodies)))}"]
    rules += [f"body_{number}: {body}" for number, body in enumerate(bodies)]
    if tools.must_call or answer:
        calls = 'call ("\\n" call)*' if tools.is_parallel else "call"
        rules = [f"start: {calls}{' | @answer' if answer else ''}", f"call: {_quoted(OPENING)} body", *rules]
    else:
        start = "(opening body)* TEXT" if tools.is_parallel else "opening body | TEXT"
        rules = [f"start: {start}", f"opening[suffix={_quoted(OPENING)}]: TEXT", _TEXT, *rules]
    return [_lark("calls", rules), *answer, *arguments]


def _arguments(name: str, tool: Tool) -> _Grammar:
    try:
        return _named(name, "schema", tool.schema, f"{tool.param}.parameters")
    except BadRequest:
        if tool.is_strict:
            raise
        return _named(name, "schema", _ANY_OBJECT, tool.param)  # nobody asked that its schema be followed


def _named(name: str, kind: str, value: str, param: str) -> _Grammar:
    """One grammar, after it has been tried."""
    from llguidance import LLMatcher

    if len(value) > MAX_GUIDE_CHARS:
        raise BadRequest(f"{param} is longer than {MAX_GUIDE_CHARS} characters", param=param)
    try:
        if kind == "schema":
            # On one line: free white space would let an output grow without end.
            grammar = LLMatcher.grammar_from_json_schema(
                value,
                overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        else:
            pattern = value if kind == "regex" else "|".join(map(_literally, json.loads(value)))
            grammar = LLMatcher.grammar_from_regex(pattern)
    except ValueError as error:
        raise BadRequest(f"{param}: {error}", param=param) from error
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        raise BadRequest(f"{param} cannot be followed: {messages[0][:500]}", param=param)
    (only,) = json.loads(grammar)["grammars"]
    return {**only, "name": name}


def _lark(name: str, rules: Sequence[str]) -> _Grammar:
    return {"name": name, "lark_grammar": "\n".join(rules)}


def _spelled(grammars: Sequence[_Grammar]) -> str:
    return json.dumps({"grammars": grammars}) if grammars else ""


def _quoted(text: str) -> str:
    """A text as Lark spells it."""
    return json.dumps(text, ensure_ascii=False)


def _literally(text: str) -> str:
    """The regular expression that only this text matches."""
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)
