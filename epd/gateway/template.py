"""A checkpoint's chat template: messages become one text.

The template is code from whoever published the checkpoint, so it runs in Jinja's immutable sandbox and sees plain JSON values
only. It is given what `apply_chat_template` of transformers gives it, and renders the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from epd.errors import BadCheckpoint, BadRequest
from epd.gateway.speech import THINK, Speech, Thinking

_PROBE = {"role": "user", "content": "?"}
_PROBE_CALL: dict[str, Any] = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "look_around", "arguments": {"where": ["left", {"how far": 2}]}},
}
_PROBE_RESULT = {"role": "tool", "tool_call_id": "call_0", "content": "a lighthouse"}
_PROBE_TOOL = {"type": "function", "function": {"name": "look_around", "description": "Looks", "parameters": {"type": "object"}}}
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """One compiled template with the checkpoint's named tokens (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, *, named_tokens: Mapping[str, str] | None = None, where: str = "chat template") -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            known = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise BadCheckpoint(f"{where} is not a template: {error}") from error
        self._knows_thoughts = THINK in source
        self._named_tokens = dict(named_tokens or {})
        self.options = frozenset(known) - _GIVEN - set(self._named_tokens) - set(environment.globals)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """From `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, the first that has one; None if none has.

        Raises:
            BadCheckpoint: a file cannot be read or holds no template.
        """
        folder = Path(folder)
        config = _read_object(folder / "tokenizer_config.json")
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token") and _content(value)}
        plain = folder / "chat_template.jinja"
        if plain.is_file():
            return cls(plain.read_text(encoding="utf-8"), named_tokens=tokens, where=str(plain))
        for path, holder in ((folder / "chat_template.json", None), (folder / "tokenizer_config.json", config)):
            source = _default_template((_read_object(path) if holder is None else holder).get("chat_template"), path)
            if source is not None:
                return cls(source, named_tokens=tokens, where=str(path))
        return None

    @cached_property
    def has_tools(self) -> bool:
        """Whether it tells a model of functions, and has calls written in the way that is read here.

        Found out by having it write a call, which then has to be found in what it wrote.
        """
        asked = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        try:
            without, with_tool = self.render([_PROBE]), self.render([_PROBE], tools=[_PROBE_TOOL])
            with_call = self.render([_PROBE, asked, _PROBE_RESULT], tools=[_PROBE_TOOL])
        except BadRequest:
            return False
        function = _PROBE_CALL["function"]
        found = Speech(thinking=Thinking.NONE, can_call=True).feed(with_call, is_last=True).calls
        return (
            function["name"] not in without
            and function["name"] in with_tool
            and [part.name for part in found if part.name] == [function["name"]]
            and json.loads("".join(part.arguments for part in found)) == function["arguments"]
            and _PROBE_RESULT["content"] in with_call
        )

    def thinking_after(self, rendered: str) -> Thinking:
        """Whether an output that follows a rendered prompt begins with thoughts."""
        return Thinking.after(rendered) if self._knows_thoughts else Thinking.NONE

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> str:
        """The prompt for the assistant's next turn.

        Args:
            messages: `role` and `content`; of a call `tool_calls`, as the template takes them.
            options: values of the template's variables, those of `self.options`.
            tools: the functions that may be called, as OpenAI's API describes them.

        Raises:
            BadRequest: the template refuses the messages or cannot cope with them.
        """
        try:
            return self._template.render(
                {
                    **self._named_tokens,
                    **(options or {}),
                    "messages": messages,
                    "tools": list(tools) or None,
                    "documents": None,
                    "add_generation_prompt": True,
                }
            )
        except jinja2.TemplateError as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        except Exception as error:  # the template's own code: whatever Python raises on values it did not expect
            raise BadRequest(
                f"the model's chat template cannot render these messages ({type(error).__name__}: {error})", param="messages"
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; serving renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return value


def _default_template(value: object, path: Path) -> str | None:
    """Some checkpoints have several templates with names; `default` is the one for chats."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise BadCheckpoint(f"{path}: chat_template must be a text, not {type(value).__name__}")


def _content(value: object) -> str:
    """A named token is spelled as a text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
