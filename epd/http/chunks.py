"""The bodies of answers: whole, and as the chunks of a stream.

Streaming is the hot path: each chunk of a choice differs from the one before in its text only, so everything around the text is
encoded once per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

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
    """/v1/chat/completions."""

    def __init__(self, identity: Identity, *, include_usage: bool, wants_logprobs: bool) -> None:
        self._identity = identity
        self._wants_logprobs = wants_logprobs
        self._frame = _Frame(identity, "chat.completion.chunk", include_usage=include_usage)
        self._before: dict[int, bytes] = {}
        self._after = b'},"logprobs":null,"finish_reason":null}' + self._frame.end

    def opening(self, num_choices: int) -> bytes:
        role = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(b"%s%d%s%s" % (self._frame.start, index, role, self._frame.end) for index in range(num_choices))

    def delta(self, delta: Delta) -> bytes:
        index = delta.index
        before = self._before.get(index)
        if before is None:
            before = self._before[index] = b'%s%d,"delta":{"content":' % (self._frame.start, index)
        if not delta.finish_reason and not delta.logprobs:
            return before + _encode(delta.text) + self._after
        content = b'"content":' + _encode(delta.text) if delta.text else b""
        logprobs = _encode(_chat_logprobs(delta.logprobs)) if delta.logprobs else b"null"
        finish = _encode(delta.finish_reason or None)
        return b'%s%d,"delta":{%s},"logprobs":%s,"finish_reason":%s}%s' % (
            self._frame.start, index, content, logprobs, finish, self._frame.end,
        )  # fmt: skip

    def usage(self, usage: Usage) -> bytes:
        return self._frame.usage(usage)

    def timeline(self, spans: Sequence[TimelineSpan]) -> bytes:
        return self._frame.timeline(spans)

    def whole(self, choices: Sequence[Choice], usage: Usage, spans: Sequence[TimelineSpan] | None = None) -> bytes:
        described = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _chat_logprobs(choice.logprobs) if self._wants_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return _whole(self._identity, "chat.completion", described, usage, spans)


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
