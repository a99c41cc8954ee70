"""The messages of a chat: what who has said, shown, called and found out, checked and as chat templates take them.

Knows roles and kinds of content. Does not know templates, or where an image URL leads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd.errors import BadRequest, Unsupported
from epd.http.fields import MAX_DEPTH, Fields, is_deeper, kind, shown
from epd.http.tools import function_name

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of one message
_ROLES = '"system", "developer", "user", "assistant" or "tool"'
_NEUTRAL_MESSAGE: Mapping[str, Sequence[object]] = {"annotations": ([],)}


@dataclass(frozen=True, slots=True)
class Limits:
    """What depends on the model and on how the server was started."""

    vocab_size: int
    max_images: int
    max_choices: int  # that run at once, over all requests
    takes_images: bool = True


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as the request names it: a data URL or an http(s) URL; `param` is where it stands."""

    url: str
    param: str


def parse_messages(value: object, limits: Limits) -> tuple[tuple[dict[str, object], ...], tuple[ImageSource, ...]]:
    """The messages, and the images in them in order. Raises BadRequest and Unsupported, which name the field."""
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a non-empty array of messages", param="messages")
    if len(value) > MAX_MESSAGES:
        raise BadRequest(f"the request holds {len(value)} messages; at most {MAX_MESSAGES} are taken", param="messages")
    conversation = _Conversation()
    messages = tuple(conversation.message(item, f"messages[{index}]") for index, item in enumerate(value))
    images = conversation.images
    if images and not limits.takes_images:
        raise Unsupported("this model takes no images", param=images[0].param)
    if len(images) > limits.max_images:
        raise BadRequest(f"the request holds {len(images)} images; at most {limits.max_images} are taken", param="messages")
    return messages, tuple(images)


class _Conversation:
    """What has come so far."""

    def __init__(self) -> None:
        self.images: list[ImageSource] = []
        self._call_ids: set[str] = set()  # made in the last message of the assistant's that had any

    def message(self, value: object, path: str) -> dict[str, object]:
        fields = Fields(value, path)
        role = fields.require("role", what=_ROLES)
        message: dict[str, object]
        match role:
            case "user":
                message = {"content": self._content(fields, may_have_images=True)}
            case "system" | "developer":
                message = {"content": self._content(fields)}
            case "assistant":
                message = self._assistant(fields)
            case "tool":
                message = self._result(fields)
            case "function":
                raise Unsupported(f'{path}.role "function" is not supported; results of calls have "tool"', param=f"{path}.role")
            case _:
                raise fields.wrong("role", _ROLES, role)
        fields.refuse_rest(_NEUTRAL_MESSAGE)
        # OpenAI's newer word for the system's messages; chat templates know the older one.
        return {"role": "system" if role == "developer" else role, **message}

    def _assistant(self, fields: Fields) -> dict[str, object]:
        message: dict[str, object] = {}
        thoughts = [text for name in ("reasoning_content", "reasoning") if (text := fields.string(name)) is not None]
        if thoughts:
            message["reasoning_content"] = thoughts[0]
        calls = [_call(item, fields.path(f"tool_calls[{index}]")) for index, item in enumerate(fields.array("tool_calls") or ())]
        if calls:
            message["tool_calls"] = calls
            self._call_ids = {str(call["id"]) for call in calls}
        content = self._content(fields, is_required=not calls)
        fields.take("parsed")  # what OpenAI's client made of it
        return {"content": content, **message}

    def _result(self, fields: Fields) -> dict[str, object]:
        """What a call has led to; agents that look at screens answer with images."""
        call_id = fields.require("tool_call_id", what="the id of the call that this is the result of")
        if not isinstance(call_id, str) or call_id not in self._call_ids:
            raise BadRequest(
                f"{fields.path('tool_call_id')} is {shown(call_id)}, which is no call of the assistant's message before it",
                param=fields.path("tool_call_id"),
            )
        name = fields.string("name")
        message: dict[str, object] = {"tool_call_id": call_id, "content": self._content(fields, may_have_images=True)}
        return message if name is None else {**message, "name": name}

    def _content(
        self, fields: Fields, *, may_have_images: bool = False, is_required: bool = True
    ) -> str | list[dict[str, object]]:
        content = fields.take("content")
        if content is None:
            if is_required:
                raise BadRequest(
                    f"{fields.path('content')} is required: a string or an array of parts", param=fields.path("content")
                )
            return ""
        return content if isinstance(content, str) else self._parts(content, fields.path("content"), may_have_images)

    def _parts(self, value: object, path: str, may_have_images: bool) -> list[dict[str, object]]:
        if not isinstance(value, list) or not value:
            raise BadRequest(f"{path} must be a string or a non-empty array of parts, not {kind(value)}", param=path)
        if len(value) > MAX_PARTS:
            raise BadRequest(f"{path} holds {len(value)} parts; at most {MAX_PARTS} are taken", param=path)
        parts: list[dict[str, object]] = []
        for index, item in enumerate(value):
            fields = Fields(item, f"{path}[{index}]")
            path_type = fields.path("type")
            match part_type := fields.string("type"):
                case "text":
                    text = fields.require("text", what="a string")
                    if not isinstance(text, str):
                        raise fields.wrong("text", "a string", text)
                    parts.append({"type": "text", "text": text})
                case "image_url":
                    if not may_have_images:
                        raise Unsupported(f"{path_type}: only messages of users and tools may hold images", param=path_type)
                    self.images.append(_image(fields))
                    parts.append({"type": "image"})
                case _:
                    raise Unsupported(f'{path_type} must be "text" or "image_url", not {shown(part_type)}', param=path_type)
            fields.refuse_rest({})
        return parts


def _image(part: Fields) -> ImageSource:
    path = part.path("image_url")
    fields = Fields(part.require("image_url", what="an object with a url"), path)
    url = fields.require("url", what="a data URL, or an http(s) URL of an allowed host")
    if not isinstance(url, str):
        raise fields.wrong("url", "a string", url)
    # Images are always read in full, which is what "high" asks for.
    fields.string("detail", choices=("auto", "high"))
    fields.refuse_rest({})
    return ImageSource(url, fields.path("url"))


def _call(value: object, path: str) -> dict[str, object]:
    """A call as it was answered; templates take its arguments as an object, as models have been taught them."""
    fields = Fields(value, path)
    call_id = fields.require("id", what="the id that the call was answered with")
    if not isinstance(call_id, str):
        raise fields.wrong("id", "a string", call_id)
    fields.string("type", choices=("function",))
    function = Fields(fields.require("function", what="an object with name and arguments"), fields.path("function"))
    fields.refuse_rest({})
    name = function_name(function)
    arguments = function.string("arguments") or "{}"
    function.take("parsed_arguments")  # what OpenAI's client made of them
    function.refuse_rest({})
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": _as_object(arguments)}}


def _as_object(arguments: str) -> object:
    """What a model has written may be no JSON: then it is handed on as the text that it is."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and not is_deeper(value, MAX_DEPTH) else arguments
