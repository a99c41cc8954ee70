"""A model's output, taken apart: what it thought, what it says, and which functions it calls.

Output comes in pieces of any length, and each is passed on as soon as it is clear what it is: only what may still turn out to be
a tag, or white space before one, is held back. What begins like a call and is none is text like any other, so nothing that a
model wrote is lost but the tags and the white space around them.

Knows how thoughts and calls are written. Does not know tokens, HTTP, or which functions there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from epd.gateway.tools import CLOSING, OPENING

THINK = "<think>"
THINK_END = "</think>"
# Up to the arguments, which then pass as they come.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,256})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_MAX_HEAD_CHARS = 512
# Models lose count of braces.
_TAIL = re.compile(r"[\s}]*" + re.escape(CLOSING))


class Thinking(Enum):
    """What a prompt says of thoughts before the answer."""

    NONE = "there are none"
    POSSIBLE = "the model may begin with a tag, and then thinks"
    BEGUN = "the prompt ends with the tag: the output begins with thoughts"

    @classmethod
    def after(cls, prompt: str) -> Thinking:
        """Of a rendered prompt, by a template that knows thoughts."""
        end = prompt.rstrip()
        if end.endswith(THINK):
            return cls.BEGUN
        return cls.NONE if end.endswith(THINK_END) else cls.POSSIBLE


@dataclass(slots=True)
class CallPart:
    """A piece of the answer's call number `index`. The first one has the name, the others more of the arguments' JSON text."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """What a piece of output turned out to hold."""

    thoughts: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.thoughts or self.content or self.calls)


class Speech:
    """The output of one choice. Feed it text until the last piece."""

    def __init__(self, *, thinking: Thinking, can_call: bool) -> None:
        self._can_call = can_call
        self._held = ""
        self._said = Said()
        self._is_last = False
        self._drops_space = thinking is Thinking.BEGUN  # white space that comes next is no part of anything
        self.num_calls = 0
        self._searched = 0  # of what is held: has no closing tag
        self._nesting = _Nesting()
        starts = {Thinking.NONE: self._content, Thinking.POSSIBLE: self._beginning, Thinking.BEGUN: self._thoughts}
        # Each reads on from what is held, and says whether there is more to read at once.
        self._state: Callable[[], bool] = starts[thinking]

    def feed(self, text: str, *, is_last: bool) -> Said:
        """What the text completes; everything that is still held, with the last one."""
        self._held += text
        self._is_last = is_last
        while self._state():
            pass
        said, self._said = self._said, Said()
        return said

    # --- states -----------------------------------------------------------------------------------------------------

    def _beginning(self) -> bool:
        start = self._held.lstrip()
        if start.startswith(THINK):
            self._held = start[len(THINK) :]
            self._drops_space = True
            return self._become(self._thoughts)
        if THINK.startswith(start) and not self._is_last:
            return False
        return self._become(self._content)

    def _thoughts(self) -> bool:
        thoughts, is_over = self._until(THINK_END)
        self._said.thoughts += thoughts
        if not is_over:
            return False
        self._drops_space = True
        return self._become(self._content)

    def _content(self) -> bool:
        if self._is_last and self.num_calls and not self._held.strip():
            self._held = ""
        content, is_call = self._until(OPENING if self._can_call else "")
        self._said.content += content
        return is_call and self._become(self._head)

    def _head(self) -> bool:
        if match := _HEAD.match(self._held[:_MAX_HEAD_CHARS]):
            self._call(match[1])
            self._held = self._held[match.end() :]
            self._nesting = _Nesting()
            return self._become(self._arguments)
        end = self._held.find(CLOSING, self._searched)
        if end < 0 and not self._is_last:
            self._searched = max(0, len(self._held) - len(CLOSING))
            return False
        self._searched = 0
        body, tag = (self._held[:end], CLOSING) if end >= 0 else (self._held, "")
        self._held = self._held[len(body) + len(tag) :]
        if (call := _call_of(body)) is not None:
            self._call(*call)
        else:
            self._said.content += OPENING + body + tag
        return self._become(self._content)

    def _arguments(self) -> bool:
        length, is_over = self._nesting.scan(self._held)
        if length:
            self._said.calls.append(CallPart(self.num_calls - 1, arguments=self._held[:length]))
            self._held = self._held[length:]
        return is_over and self._become(self._tail)

    def _tail(self) -> bool:
        """What closes a call; where it is missing, text goes on."""
        match = _TAIL.match(self._held)
        if match is None and not self._is_last and _may_become_tail(self._held):
            return False
        self._held = self._held[match.end() :] if match else self._held.lstrip().removeprefix("}")
        return self._become(self._content)

    # --- help -------------------------------------------------------------------------------------------------------

    def _become(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _call(self, name: str, arguments: str = "") -> None:
        self._said.calls.append(CallPart(self.num_calls, name, arguments))
        self.num_calls += 1

    def _until(self, tag: str) -> tuple[str, bool]:
        """The text up to a tag, and whether it has come; the tag and the white space before it are dropped."""
        if self._drops_space:
            self._held = self._held.lstrip()
            self._drops_space = not self._held
        before, found, after = self._held.partition(tag) if tag else (self._held, "", "")
        if found:
            self._held = after
            return before.rstrip(), True
        if self._is_last:
            self._held = ""
            return before, False
        kept = before.removesuffix(_beginning_of(tag, before)).rstrip() if tag else before
        self._held = before[len(kept) :]
        return kept, False


class _Nesting:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> tuple[int, bool]:
        """How many characters belong to the object, and whether that was its end."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return index + 1, True
            elif char == "<":  # not JSON: the tag that closes the call, before its arguments were
                return index, True
        return len(text), False


def _call_of(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose fields are not where they are expected; None of what is no call."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some spell them out
        return name, arguments
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _may_become_tail(text: str) -> bool:
    return CLOSING.startswith(text.lstrip("} \t\r\n"))


def _beginning_of(tag: str, text: str) -> str:
    """The longest end of the text that the tag begins with."""
    return next((tag[:length] for length in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:length])), "")
