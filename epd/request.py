"""A request as the gateway knows it, after the HTTP layer has checked it and the prompt has been tokenized."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from epd.timeline import Timeline
from protocol.messages import MMItem, RequestId, Sampling


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image's bytes beside the item that stands for it in the prompt."""

    item: MMItem
    data: bytes


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One client request: a prompt and `n` choices of output."""

    request_id: RequestId
    token_ids: tuple[int, ...]  # placeholders already expanded
    images: tuple[PromptImage, ...]
    sampling: Sampling
    n: int = 1
    stop: tuple[str, ...] = ()  # stop strings; looked for in the detokenized text
    deadline_s: float = 600.0
    timeline: Timeline = field(default_factory=Timeline)  # filled while the request runs
    traceparent: str = ""  # the client's headers of W3C trace context, as they came
    tracestate: str = ""


class TextLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token's log probability with its text, as the API reports it."""

    token_id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[tuple[int, str, bytes, float], ...] = ()  # (token_id, text, bytes, logprob)


class Delta(msgspec.Struct, frozen=True, gc=False):  # one per token and choice: a struct is made in a third of the time
    """A piece of one choice's output. The last one of a choice carries `finish_reason` ("stop" or "length")."""

    index: int
    text: str
    num_tokens: int  # output tokens that this piece stands for
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: str = ""
    num_cached_tokens: int = 0  # set on the first delta of a choice
