"""What the decode scheduler has written down twice, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from epd.decode.request import DecodePlan, DecodeRequest, DecodeState
from protocol.messages import RequestId


@dataclass(frozen=True, slots=True)
class Books:
    requests: Sequence[DecodeRequest]  # waiting, receiving and running
    waiting: Set[RequestId]
    running: Set[RequestId]
    leaving: Sequence[DecodeRequest]
    in_flight: Sequence[DecodePlan]  # oldest first
    block_size: int
    max_steps_in_flight: int


def what_is_wrong(books: Books) -> list[str]:
    return [
        *_wrong_indexes(books),
        *_wrong_flights(books),
        *(text for request in books.requests for text in _wrong_numbers(request, books.block_size)),
    ]


def _wrong_indexes(books: Books) -> Iterable[str]:
    for state, index in ((DecodeState.WAITING, books.waiting), (DecodeState.RUNNING, books.running)):
        if index != {request.request_id for request in books.requests if request.state is state}:
            yield f"the index of {state.name} requests is wrong"
    if any(request.state is not DecodeState.LEAVING or not request.num_steps_in_flight for request in books.leaving):
        yield "a request stays without a step in flight"


def _wrong_flights(books: Books) -> Iterable[str]:
    """Every step in flight belongs to a request that is still held, and writes to a block of its table."""
    if len(books.in_flight) > books.max_steps_in_flight:
        yield f"{len(books.in_flight)} steps are in flight"
    counts = Counter(step.request for plan in books.in_flight for step in plan.steps)
    for request in (*books.requests, *books.leaving):
        if counts.pop(request, 0) != request.num_steps_in_flight:
            yield f"{request.request_id}: not in {request.num_steps_in_flight} steps in flight, as it says"
    if counts:
        yield f"in flight are steps of requests that have gone: {sorted(request.request_id for request in counts)}"
    for plan in books.in_flight:
        for step in plan.steps:
            if step.position >= len(step.request.block_table) * books.block_size:
                yield f"{step.request.request_id}: no block for the step in flight at {step.position}"


def _wrong_numbers(request: DecodeRequest, block_size: int) -> Iterable[str]:
    num_blocks = len(request.block_table)
    match request.state:
        case DecodeState.WAITING:
            is_right = num_blocks == 0
        case DecodeState.RECEIVING:
            is_right = num_blocks == -(-(request.num_tokens + 1) // block_size)
        case _:
            is_right = request.num_computed_tokens == request.num_tokens - 1 and num_blocks * block_size >= request.next_position
    if not is_right:
        numbers = (request.num_computed_tokens, request.num_tokens, num_blocks)
        yield f"{request.request_id}, {request.state.name}: computed tokens, tokens and blocks are {numbers}"
