"""What the prefill scheduler has written down twice, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from epd.prefill.request import PrefillPlan, PrefillRequest, PrefillState
from protocol.messages import RequestId


@dataclass(frozen=True, slots=True)
class Books:
    requests: Sequence[PrefillRequest]  # waiting, running and finished
    waiting: Set[RequestId]
    running: Set[RequestId]
    leaving: Sequence[PrefillRequest]
    computing: Sequence[PrefillRequest]  # who others wait for
    in_flight: Sequence[PrefillPlan]  # oldest first
    block_size: int
    max_steps_in_flight: int


def what_is_wrong(books: Books) -> list[str]:
    return [
        *_wrong_indexes(books),
        *_wrong_flights(books),
        *(text for request in books.requests for text in _wrong_numbers(request, books.block_size)),
    ]


def _wrong_indexes(books: Books) -> Iterable[str]:
    for state, index in ((PrefillState.WAITING, books.waiting), (PrefillState.RUNNING, books.running)):
        if index != {request.request_id for request in books.requests if request.state is state}:
            yield f"the index of {state.name} requests is wrong"
    if any(request.state is not PrefillState.LEAVING or not request.num_steps_in_flight for request in books.leaving):
        yield "a request stays without a step in flight"
    if any(request.state is not PrefillState.RUNNING for request in books.computing):
        yield "a block is waited for that nobody computes"


def _wrong_flights(books: Books) -> Iterable[str]:
    """Every chunk in flight belongs to a request that is still held, and to what it has scheduled and not computed."""
    if len(books.in_flight) > books.max_steps_in_flight:
        yield f"{len(books.in_flight)} steps are in flight"
    chunks = [chunk for plan in books.in_flight for chunk in plan.chunks]
    counts = Counter(chunk.request for chunk in chunks)
    for request in (*books.requests, *books.leaving):
        if counts.pop(request, 0) != request.num_steps_in_flight:
            yield f"{request.request_id}: not in {request.num_steps_in_flight} steps in flight, as it says"
        if not request.num_steps_in_flight and request.num_scheduled_tokens != request.num_computed_tokens:
            yield f"{request.request_id}: what it has scheduled is not in flight"
    if counts:
        yield f"in flight are steps of requests that have gone: {sorted(request.request_id for request in counts)}"
    for chunk in chunks:
        if chunk.start < chunk.request.num_computed_tokens or chunk.end > len(chunk.request.block_table) * books.block_size:
            yield f"{chunk.request.request_id}: the chunk in flight from {chunk.start} to {chunk.end} cannot be"


def _wrong_numbers(request: PrefillRequest, block_size: int) -> Iterable[str]:
    numbers = (request.num_cached_tokens, request.num_computed_tokens, request.num_scheduled_tokens, request.num_tokens)
    if list(numbers) != sorted(numbers):
        yield f"{request.request_id}: cached, computed, scheduled and all tokens are {numbers}"
    num_due = 0 if request.state is PrefillState.WAITING else -(-request.num_tokens // block_size)
    if len(request.block_table) != num_due:
        yield f"{request.request_id}: {len(request.block_table)} blocks held, {num_due} due"
    if request.state is PrefillState.FINISHED and request.num_computed_tokens != request.num_tokens:
        yield f"{request.request_id}: finished with {request.num_computed_tokens} of {request.num_tokens} tokens"
