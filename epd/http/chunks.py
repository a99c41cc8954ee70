"""The bodies of answers: whole, and as the chunks of a stream.

Streaming is the hot path: each chunk of a choice differs from the one before in its text only, so everything around the text is
encoded once per request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from epd.gateway.speech import CallPart, Said, Speech
from epd.request import Delta, TextLogprob
from epd.timeline import TimelineSpan

_encode = msgspec.json.encode
# JSON has no infinity; what OpenAI's API reports for a token that cannot come.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What every body of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(slots=True)
class Usage:
    """Token counts of one answer, summed up as deltas come in."""

    num_prompt_tokens: int
    num_choices: int = 1  # per prompt
    num_output_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        self.num_output_tokens += delta.num_tokens
        if delta.num_cached_tokens and delta.index % self.num_choices == 0:
            self.num_cached_tokens += delta.num_cached_tokens  # all choices of a prompt share its cached tokens: count them once

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


class Format(Protocol):
    """One endpoint's way of saying things, for one answer. The `index` of a delta counts choices over all prompts."""

    def opening(self, num_choices: int) -> bytes:
        """Events that come before any text."""

    def delta(self, delta: Delta) -> bytes: ...

    def usage(self, usage: Usage) -> bytes:
        """The event that closes a stream with its counts."""

    def timeline(self, spans: Sequence[TimelineSpan]) -> bytes:
        """The event that tells how the request's time went."""

    def whole(self, choices: Sequence[Choice], usage: Usage, spans: Sequence[TimelineSpan] | None = None) -> bytes:
        """`spans`: None where nobody asked for them."""


@dataclass(slots=True)
class Choice:
    """One choice of an answer that is sent whole."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ChatFormat:
    """/v1/chat/completions. `speech` makes what takes an output apart, where it may hold more than content."""

    def __init__(
        self, identity: Identity, *, include_usage: bool, wants_logprobs: bool, speech: Callable[[], Speech] | None = None
    ) -> None:
        self._identity = identity
        self._new_speech = speech
        self._speeches: dict[int, Speech] = {}
        self._wants_logprobs = wants_logprobs
        self._frame = _Frame(identity, "chat.completion.chunk", include_usage=include_usage)
        self._before: dict[int, bytes] = {}
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._frame.end

    def opening(self, num_choices: int) -> bytes:
        role = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(b"%s%d%s%s" % (self._frame.start, index, role, self._frame.end) for index in range(num_choices))

    def delta(self, delta: Delta) -> bytes:
        index = delta.index
        if self._new_speech is not None:
            return self._taken_apart(delta, self._new_speech)
        before = self._before.get(index)
        if before is None:
            before = self._before[index] = b'%s%d,"delta":{"content":' % (self._frame.start, index)
        if not delta.finish_reason and not delta.logprobs:
            return before + _encode(delta.text) + self._after
        return self._event(delta, {"content": delta.text} if delta.text else {}, delta.finish_reason)

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)

    def timeline(self, spans: Sequence[TimelineSpan]) -> bytes:
        return self._frame.timeline(spans)

    def whole(self, choices: Sequence[Choice], usage: Usage, spans: Sequence[TimelineSpan] | None = None) -> bytes:
        described = [
            {
                "index": index,
                **self._message(choice),
                "logprobs": _chat_logprobs(choice.logprobs) if self._wants_logprobs else None,
            }
            for index, choice in enumerate(choices)
        ]
        return _whole(self._identity, "chat.completion", described, usage, spans)

    def _message(self, choice: Choice) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._new_speech is None:
            return {"message": message, "finish_reason": choice.finish_reason}
        speech = self._new_speech()
        said = speech.feed(choice.text, is_last=True)
        if said.thoughts:
            message["reasoning_content"] = said.thoughts
        if calls := _whole_calls(said):
            message["tool_calls"] = calls
        message["content"] = said.content if said.content or not calls else None
        return {"message": message, "finish_reason": _finish_reason(choice.finish_reason, speech)}

    def _taken_apart(self, delta: Delta, new_speech: Callable[[], Speech]) -> bytes:
        speech = self._speeches.get(delta.index)
        if speech is None:
            speech = self._speeches[delta.index] = new_speech()
        said = speech.feed(delta.text, is_last=bool(delta.finish_reason))
        if not said and not delta.finish_reason and not delta.logprobs:
            return b""
        parts: dict[str, object] = {}
        if said.thoughts:
            parts["reasoning_content"] = said.thoughts
        if said.content:
            parts["content"] = said.content
        if said.calls:
            parts["tool_calls"] = [_call_delta(part) for part in said.calls]
        return self._event(delta, parts, _finish_reason(delta.finish_reason, speech))

    def _event(self, delta: Delta, parts: dict[str, object], finish_reason: str) -> bytes:
        logprobs = _encode(_chat_logprobs(delta.logprobs)) if delta.logprobs else b"null"
        return b'%s%d,"delta":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._frame.start, delta.index, _encode(parts), logprobs, _encode(finish_reason or None), self._frame.end,
        )  # fmt: skip


class CompletionFormat:
    """/v1/completions."""

    def __init__(self, identity: Identity, *, include_usage: bool, num_logprobs: int) -> None:
        self._identity = identity
        self._num_logprobs = num_logprobs
        self._frame = _Frame(identity, "text_completion", include_usage=include_usage)
        self._before: dict[int, bytes] = {}
        self._after = b',"logprobs":null,"finish_reason":null}' + self._frame.end
        self._offsets: dict[int, int] = {}

    def opening(self, num_choices: int) -> bytes:
        return b""

    def delta(self, delta: Delta) -> bytes:
        index = delta.index
        before = self._before.get(index)
        if before is None:
            before = self._before[index] = b'%s%d,"text":' % (self._frame.start, index)
        if not delta.finish_reason and not delta.logprobs:
            return before + _encode(delta.text) + self._after
        logprobs = b"null"
        if delta.logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = _encode(_completion_logprobs(delta.logprobs, offset, self._num_logprobs))
            self._offsets[index] = offset + sum(len(item.text) for item in delta.logprobs)
        finish = _encode(delta.finish_reason or None)
        return b'%s%s,"logprobs":%s,"finish_reason":%s}%s' % (before, _encode(delta.text), logprobs, finish, self._frame.end)

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)

    def timeline(self, spans: Sequence[TimelineSpan]) -> bytes:
        return self._frame.timeline(spans)

    def whole(self, choices: Sequence[Choice], usage: Usage, spans: Sequence[TimelineSpan] | None = None) -> bytes:
        described = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _completion_logprobs(choice.logprobs, 0, self._num_logprobs) if self._num_logprobs >= 0 else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return _whole(self._identity, "text_completion", described, usage, spans)


class _Frame:
    """What stands before the number of the choice and after the choice, in every event of an answer."""

    def __init__(self, identity: Identity, kind: str, *, include_usage: bool) -> None:
        described = _encode(_described(identity, kind))
        self._head = b"data: " + described[:-1]
        self.start = self._head + b',"choices":[{"index":'
        # With include_usage every event has the field, and only the last one has the counts.
        self.end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._head, _encode(usage.as_json()))

    def timeline(self, spans: Sequence[TimelineSpan]) -> bytes:
        return b'%s,"choices":[],"epd":{"spans":%s}}\n\n' % (self._head, _encode(spans))


def _described(identity: Identity, kind: str) -> dict[str, object]:
    return {
        "id": identity.id,
        "object": kind,
        "created": identity.created,
        "model": identity.model,
        "system_fingerprint": identity.system_fingerprint,
    }


def _whole(identity: Identity, kind: str, choices: Sequence[object], usage: Usage, spans: Sequence[TimelineSpan] | None) -> bytes:
    extra = {} if spans is None else {"epd": {"spans": spans}}
    return _encode({**_described(identity, kind), "choices": choices, "usage": usage.as_json(), **extra})


def _finish_reason(finish_reason: str, speech: Speech) -> str:
    return "tool_calls" if finish_reason == "stop" and speech.num_calls else finish_reason


def _call_delta(part: CallPart) -> dict[str, object]:
    if part.name:
        return {"index": part.index, **_call(part.name, part.arguments)}
    return {"index": part.index, "function": {"arguments": part.arguments}}


def _whole_calls(said: Said) -> list[dict[str, object]]:
    calls: dict[int, list[CallPart]] = {}
    for part in said.calls:
        calls.setdefault(part.index, []).append(part)
    return [_call(parts[0].name, "".join(part.arguments for part in parts)) for parts in calls.values()]


def _call(name: str, arguments: str) -> dict[str, object]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _chat_logprobs(logprobs: Sequence[TextLogprob]) -> dict[str, object]:
    content = [
        {
            "token": item.text,
            "logprob": max(item.logprob, _LEAST_LOGPROB),
            "bytes": list(item.data),
            "top_logprobs": [
                {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}
                for _, text, data, logprob in item.top
            ],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(logprobs: Sequence[TextLogprob], offset: int, num_top: int) -> dict[str, object]:
    """The older shape: parallel arrays, the best tokens as an object by their text."""
    offsets = []
    for item in logprobs:
        offsets.append(offset)
        offset += len(item.text)
    top = [
        {
            **{text: max(logprob, _LEAST_LOGPROB) for _, text, _, logprob in reversed(item.top)},
            item.text: max(item.logprob, _LEAST_LOGPROB),
        }
        for item in logprobs
    ]
    return {
        "tokens": [item.text for item in logprobs],
        "token_logprobs": [max(item.logprob, _LEAST_LOGPROB) for item in logprobs],
        "top_logprobs": top if num_top > 0 else None,
        "text_offset": offsets,
    }
