"""One request here in prefill, as the actor sees it: who waits for it, what it has received, what it has given away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from epd.microkernel.actor import Reply
from epd.prefill.handoff import KVHandoff
from epd.prefill.request import FinishedBlocks, PrefillRequest
from epd.step import Int32Array, Rows
from protocol.messages import Span, Token

_MAX_CHUNKS = 32  # that a span is kept of


@dataclass(slots=True, eq=False)
class Entry:
    request: PrefillRequest
    reply: Reply
    positions: Int32Array  # [3, num_tokens]
    rows: dict[int, Rows] = field(default_factory=dict)  # item index -> [num_tokens, embedding width]
    unwatch: Callable[[], None] = lambda: None  # what ends the watch over who asked
    finished: list[FinishedBlocks] = field(default_factory=list)  # told by the scheduler, whether pulled or not
    handoff: KVHandoff | None = None
    token: Token | None = None
    embeddings_at: list[float] = field(default_factory=list)  # when each arrived
    chunks_at: list[tuple[float, float]] = field(default_factory=list)  # of the first steps, from start to end
    embedding_wait_s: float = 0.0  # in which there was nothing to compute for want of an embedding
    last_chunk_at: float = 0.0  # its end

    def add_finished(self, blocks: FinishedBlocks) -> None:
        self.finished.append(blocks)
        if self.handoff is not None:
            self.handoff.add(blocks)

    def note_embedding(self, now: float) -> None:
        """An embedding is here; told before the scheduler is."""
        request = self.request
        if not request.is_runnable and not request.num_steps_in_flight:
            self.embedding_wait_s += now - max(request.arrived_at, self.last_chunk_at, *self.embeddings_at[-1:])
        self.embeddings_at.append(now)

    def note_chunk(self, started: float, now: float) -> None:
        self.last_chunk_at = now
        if len(self.chunks_at) < _MAX_CHUNKS:
            self.chunks_at.append((started, now))

    def drop_rows(self, needed: tuple[int, ...]) -> None:
        """Embeddings whose rows have all been computed are of no more use."""
        for index in [index for index in self.rows if index not in needed]:
            del self.rows[index]

    def spans(self, now: float) -> tuple[Span, ...]:
        arrived, admitted = self.request.arrived_at, self.request.admitted_at
        spans = [Span("prefill queue", 0.0, admitted - arrived), Span("prefill", admitted - arrived, now - arrived)]
        idle_since = admitted
        for started, ended in self.chunks_at:
            # What arrived while nothing of the request was computed is what it waited for.
            waited_for = [at for at in self.embeddings_at if idle_since < at <= started]
            if waited_for:
                spans.append(Span("wait for embedding", idle_since - arrived, max(waited_for) - arrived))
            spans.append(Span("prefill chunk", started - arrived, ended - arrived))
            idle_since = ended
        return tuple(spans)
