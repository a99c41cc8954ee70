"""Output tokens become text, piece by piece.

A piece never ends inside a character and never shows text that may turn out to be the start of a stop string. The pieces of an
output put together are its decoded text, cut where the first stop string to be complete begins, however the tokens fall.

Other servers decode a sliding window of tokens twice a step and take the difference (`prefix_offset` and `read_offset` in
text-generation-inference and vLLM). For the tokenizers supported here a token is a fixed run of bytes, so the window shrinks to
the at most three bytes of an unfinished character, kept by Python's incremental UTF-8 decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from epd.request import GenerateRequest, TextLogprob
from epd.tokenizer import Tokenizer
from protocol.messages import Token

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What can be shown of an output since the piece before. With a `finish_reason` it is the last one."""

    text: str
    num_tokens: int
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: str = ""


class Detokenizer:
    """The text side of one choice. Feed it tokens until a piece has a finish reason; nothing may be fed after that."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(request.sampling.stop_token_ids)
        self._wants_logprobs = request.sampling.num_logprobs >= 0
        self._stops = _StopStrings(request.stop) if request.stop else None
        self._utf8 = _Utf8("replace")
        self._num_tokens = 0
        self._logprobs: list[TextLogprob] = []

    def feed(self, token: Token) -> Piece | None:
        """The next piece, or None while nothing can be shown.

        A `finish_reason` of the token, or "stop" for a stop string that it completes, ends the output: the rest of the output's
        tokens, should there be any, is not wanted.
        """
        self._num_tokens += 1
        is_end = token.finish_reason == "stop" and (token.token_id in self._ends or self._tokenizer.is_special(token.token_id))
        data = b"" if is_end else self._tokenizer.token_bytes(token.token_id)
        if self._wants_logprobs and not is_end:
            self._logprobs.append(_text_logprob(self._tokenizer, token))
        text = self._utf8.decode(data, bool(token.finish_reason))
        if self._stops is not None:
            text, hit = self._stops.feed(text)
            if hit:
                return self._piece(text, "stop")
            if token.finish_reason:
                text += self._stops.rest()
        if token.finish_reason:
            return self._piece(text, token.finish_reason)
        return self._piece(text) if text else None

    def finish(self, finish_reason: str) -> Piece:
        """End an output whose last token carried no finish reason; what was held back is shown."""
        text = self._utf8.decode(b"", True)
        if self._stops is not None:
            text, hit = self._stops.feed(text)
            if hit:
                return self._piece(text, "stop")
            text += self._stops.rest()
        return self._piece(text, finish_reason)

    def _piece(self, text: str, finish_reason: str = "") -> Piece:
        piece = Piece(text, self._num_tokens, tuple(self._logprobs), finish_reason)
        self._num_tokens = 0
        self._logprobs.clear()
        return piece


class _StopStrings:
    """Finds the stop string that is complete first; holds back only what one of them could still begin with."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was found right after it."""
        if not text:
            return "", False
        pending = self._held + text
        # (end, start): the one that ends first; of those the longest.
        hits = [(start + len(stop), start) for stop in self._stops if (start := pending.find(stop)) >= 0]
        if hits:
            self._held = ""
            return pending[: min(hits)[1]], True
        keep = self._overlap(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def _text_logprob(tokenizer: Tokenizer, token: Token) -> TextLogprob:
    top = []
    for other in token.top_logprobs:
        data = tokenizer.spelling(other.token_id)
        top.append((other.token_id, data.decode("utf-8", "replace"), data, other.logprob))
    data = tokenizer.spelling(token.token_id)
    return TextLogprob(token.token_id, data.decode("utf-8", "replace"), data, token.logprob, tuple(top))
