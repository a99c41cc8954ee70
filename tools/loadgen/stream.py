"""One answer as it arrives: bytes of a server-sent-event stream and the times they came at, in; a record, out.

Sans-IO: `feed` is told what time it is, so that what is measured does not depend on how it is read. The chunks of one stream
differ in their text only, so the first one that carries text is parsed and the frame around its text is remembered: a token that
comes in the same frame costs a few comparisons, and its text is parsed when somebody wants it. What looks different is parsed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

OK = "ok"
REFUSED = "refused"  # 429: the server said no before any work; neither a success nor a failure
FAILED = "failed"
UNFINISHED = "unfinished"  # reason of a request that ran when its run was cut short

_CONTENT = b'"content":'


def _times() -> MutableSequence[float]:
    return array("d")


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds of one clock; `reason` says why it was refused or failed."""

    index: int  # of its chat
    scheduled_s: float  # when it was due; latencies count from here
    sent_s: float
    turn: int = 0
    kind: str = "text"
    num_images: int = 0
    piece_times_s: MutableSequence[float] = field(default_factory=_times)  # one per event that carries output
    end_s: float = 0.0
    outcome: str = ""
    reason: str = ""
    detail: str = ""
    http_status: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False  # else output_tokens is the number of pieces
    finish_reason: str = ""
    text: str = ""  # kept where somebody wants it
    spans: Sequence[dict[str, Any]] = ()  # the server's own timeline, where it was asked for and came


class BadStream(Exception):
    """The stream holds what no OpenAI-compatible server sends; `reason` is the record's."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class AnswerStream:
    """Reads one streamed chat completion into a record."""

    def __init__(self, record: Record, *, keeps_text: bool = True) -> None:
        self._record = record
        self._keeps_text = keeps_text
        self._pending = b""
        self._before = b"\n"  # the frame; no line begins with this
        self._after = b""
        self._texts: list[bytes] = []  # JSON strings
        self.is_done = False  # [DONE] was read

    def feed(self, data: bytes, now_s: float) -> None:
        """Take the next bytes of the body, which were read at `now_s`.

        Raises:
            BadStream: an event is no JSON object ("bad_event") or reports an error ("error_event ...").
        """
        *lines, self._pending = (self._pending + data).split(b"\n") if self._pending else data.split(b"\n")
        for line in lines:
            if line.startswith(self._before) and line.endswith(self._after):
                text = line[len(self._before) : len(line) - len(self._after)]
                if text.count(b'"') == 2 and text.startswith(b'"') and text.endswith(b'"'):  # nothing but a string without quotes
                    if len(text) > 2:
                        self._record.piece_times_s.append(now_s)
                        if self._keeps_text:
                            self._texts.append(text)
                    continue
            if line.startswith(b"data:"):  # comments, event names and blank lines say nothing here
                self._take(line, now_s)

    def close(self) -> None:
        """The body has ended properly. Not all servers say [DONE] once they have given the finish reason.

        Raises:
            BadStream: it ended before the answer did ("truncated"), or there is no output ("empty").
        """
        record = self._record
        if self._pending:  # a last line without an end
            self.feed(b"\n", record.piece_times_s[-1] if record.piece_times_s else record.sent_s)
        if not self.settle():
            raise BadStream("bad_event", "a piece of the text is no JSON string")
        if not record.finish_reason:
            raise BadStream("truncated", f"the stream ended after {len(record.piece_times_s)} pieces and without a finish reason")
        if not record.piece_times_s:
            raise BadStream("empty", "the stream finished without any output")

    def settle(self) -> bool:
        """Put into the record what is known of text and tokens, however the stream ended; whether the text was readable."""
        record = self._record
        if not record.has_usage:
            record.output_tokens = len(record.piece_times_s)
        texts, self._texts = self._texts, []
        try:
            record.text += "".join(json.loads(b"[" + b",".join(texts) + b"]"))
        except ValueError:
            return False
        return True

    def _take(self, line: bytes, now_s: float) -> None:
        event = line[5:].strip()
        if event == b"[DONE]":
            self.is_done = True
            return
        try:
            message = json.loads(event)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise BadStream("bad_event", f"not a JSON object: {event[:200]!r}")
        if message.get("error"):
            error = message["error"]
            code = error.get("code") or error.get("type") if isinstance(error, dict) else None
            raise BadStream(f"error_event {code}" if code else "error_event", str(error)[:500])
        try:
            self._take_chunk(message, line, now_s)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadStream("bad_event", f"not a chat completion chunk ({error!r}): {event[:200]!r}") from error

    def _take_chunk(self, message: dict[str, Any], line: bytes, now_s: float) -> None:
        record = self._record
        for choice in message.get("choices") or ():
            delta = choice.get("delta") or {}
            # Thinking is output, too: servers that split it off stream it in a field of its own.
            text = delta.get("content") or delta.get("reasoning_content")
            if text:
                record.piece_times_s.append(now_s)
                if self._keeps_text:
                    self._texts.append(json.dumps(text).encode())
            if choice.get("finish_reason"):
                record.finish_reason = choice["finish_reason"]
            elif delta.get("content") and not message.get("usage"):
                self._learn(line, text)
        if usage := message.get("usage"):
            record.has_usage = True
            record.input_tokens = int(usage["prompt_tokens"])
            record.output_tokens = int(usage["completion_tokens"])
            record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        if timeline := message.get("epd"):
            record.spans = timeline["spans"]

    def _learn(self, line: bytes, text: object) -> None:
        """Remember what stands before and after the text, if the text can be found for certain."""
        start = line.find(_CONTENT) + len(_CONTENT)
        if line.count(_CONTENT) != 1:
            return
        start += len(line[start:]) - len(line[start:].lstrip())
        for encoded in (json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode()):
            if line.startswith(encoded, start):
                self._before, self._after = line[:start], line[start + len(encoded) :]
                return
