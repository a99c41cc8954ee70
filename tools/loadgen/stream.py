"""One answer as it arrives: bytes of a server-sent-event stream and the times they came at, in; a record, out.

Sans-IO: `feed` is told what time it is, so that what is measured does not depend on how it is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

OK = "ok"
REFUSED = "refused"  # 429: the server said no before any work; neither a success nor a failure


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds of one clock; `outcome` is "ok", "refused" or the reason of the failure."""

    index: int
    scheduled_s: float  # when it was due; latencies count from here
    sent_s: float
    num_images: int = 0
    piece_times_s: list[float] = field(default_factory=list)  # one per event that carries output
    end_s: float = 0.0
    outcome: str = ""
    detail: str = ""
    http_status: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False  # else output_tokens is the number of pieces
    finish_reason: str = ""
    text: str = ""


class BadStream(Exception):
    """The stream holds what no OpenAI-compatible server sends; `reason` is the record's outcome."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class AnswerStream:
    """Reads one streamed chat completion into a record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._pending = b""
        self._text: list[str] = []
        self.is_done = False  # [DONE] was read

    def feed(self, data: bytes, now_s: float) -> None:
        """Take the next bytes of the body, which were read at `now_s`.

        Raises:
            BadStream: an event is no JSON object ("bad_event") or reports an error ("error_event").
        """
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):  # comments, event names and blank lines say nothing here
                self._take(line[5:].strip(), now_s)

    def close(self) -> None:
        """The body has ended properly.

        Raises:
            BadStream: it ended before the answer did ("cut"), or there is no output in it ("empty").
        """
        record = self._record
        record.text = "".join(self._text)
        if not record.has_usage:
            record.output_tokens = len(record.piece_times_s)
        if not record.finish_reason:
            raise BadStream("cut", f"the stream ended after {len(record.piece_times_s)} pieces and without a finish reason")
        if not record.piece_times_s:
            raise BadStream("empty", "the stream finished without any output")

    def _take(self, event: bytes, now_s: float) -> None:
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
            raise BadStream("error_event", str(message["error"])[:500])
        try:
            self._take_chunk(message, now_s)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadStream("bad_event", f"not a chat completion chunk ({error!r}): {event[:200]!r}") from error

    def _take_chunk(self, message: dict[str, Any], now_s: float) -> None:
        record = self._record
        for choice in message.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content"):
                record.piece_times_s.append(now_s)
                self._text.append(delta["content"])
            if choice.get("finish_reason"):
                record.finish_reason = choice["finish_reason"]
        if usage := message.get("usage"):
            record.has_usage = True
            record.input_tokens = int(usage["prompt_tokens"])
            record.output_tokens = int(usage["completion_tokens"])
            record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
