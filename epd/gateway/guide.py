"""What an output is to look like, as clients say it, becomes a grammar that the stages follow.

Grammars are llguidance's, spelled as one string. A grammar that cannot be followed is refused here, before any work is done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from epd.errors import BadRequest

MAX_GUIDE_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Guide:
    """`value`: a JSON schema as text, a regular expression in Rust's syntax, or a JSON array of the texts to choose from."""

    kind: Literal["schema", "regex", "choice"]
    value: str
    param: str  # where the request says so


def grammar_of(guide: Guide) -> str:
    """`Sampling.guide`. Takes up to a second for what is very large.

    Raises:
        BadRequest: nothing can follow it, or it is too large; says why.
    """
    from llguidance import LLMatcher

    if len(guide.value) > MAX_GUIDE_CHARS:
        raise BadRequest(f"{guide.param} is longer than {MAX_GUIDE_CHARS} characters", param=guide.param)
    try:
        match guide.kind:
            case "schema":
                # On one line: free white space would let an output grow without end.
                grammar = LLMatcher.grammar_from_json_schema(
                    guide.value,
                    overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
                )
            case "regex":
                grammar = LLMatcher.grammar_from_regex(guide.value)
            case "choice":
                grammar = LLMatcher.grammar_from_regex("|".join(map(_literally, json.loads(guide.value))))
    except ValueError as error:
        raise BadRequest(f"{guide.param}: {error}", param=guide.param) from error
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        raise BadRequest(f"{guide.param} cannot be followed: {messages[0][:500]}", param=guide.param)
    return grammar


def _literally(text: str) -> str:
    """The regular expression that only this text matches."""
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)
