"""One request's state in prefill, and what a step's plan and its outcome say about requests.

Owns: the numbers of one request. The scheduler moves them; everybody else reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from epd.errors import BadRequest, PromptTooLong
from epd.step import Int32Array
from protocol.messages import MMItem, RequestId, Sampling, Token


class PrefillState(Enum):
    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # holds all blocks that it will ever need here
    FINISHED = auto()  # has its first token; holds its blocks until they are released
    LEAVING = auto()  # aborted while a step writes into its blocks
    GONE = auto()


@dataclass(slots=True, eq=False)
class PrefillRequest:
    """The first part is given by whoever adds the request, the rest belongs to the scheduler."""

    request_id: RequestId
    epoch: int
    token_ids: Int32Array  # [num_tokens], the prompt and what was generated before
    num_prompt_tokens: int
    items: tuple[MMItem, ...]
    sampling: Sampling
    deadline: float  # on the clock that `now` is read from
    salt: str = ""
    arrived_at: float = 0.0

    state: PrefillState = PrefillState.WAITING
    order: int = 0  # of arrival
    hashes: tuple[int, ...] = ()  # of all full blocks
    has_embedding: set[int] = field(default_factory=set)  # indexes of items
    is_decode_ready: bool = False
    admitted_at: float = 0.0
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0  # found in the prefix cache
    num_scheduled_tokens: int = 0  # computed, or being computed in a step that is not committed yet
    num_computed_tokens: int = 0
    num_told_blocks: int = 0  # reported as finished
    num_steps_in_flight: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that came with the request."""
        return len(self.token_ids) - self.num_prompt_tokens

    def runnable_until(self, start: int) -> int:
        """How far a prefill that has the first `start` tokens gets before it meets an image without embedding."""
        for index, item in enumerate(self.items):
            if index not in self.has_embedding and item.offset + item.num_tokens > start:
                return max(start, item.offset)
        return self.num_tokens

    @property
    def is_runnable(self) -> bool:
        return self.runnable_until(self.num_scheduled_tokens) > self.num_scheduled_tokens

    def is_stalled(self, start: int) -> bool:
        """Whether finishing, and giving the blocks back, still depends on another worker."""
        return not self.is_decode_ready or self.runnable_until(start) < self.num_tokens


@dataclass(frozen=True, slots=True)
class ItemRows:
    """Rows [first_row, first_row + num_rows) of an item's embedding lie at `chunk_offset` of a chunk."""

    item_index: int
    first_row: int
    num_rows: int
    chunk_offset: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, start + num_new) of one request, computed in one step. `samples`: they end the prompt."""

    request: PrefillRequest
    start: int
    num_new: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_new

    def item_rows(self) -> tuple[ItemRows, ...]:
        """What of which embedding the chunk needs."""
        found = []
        for index, item in enumerate(self.request.items):
            first, last = max(self.start, item.offset), min(self.end, item.offset + item.num_tokens)
            if first < last:
                found.append(ItemRows(index, first - item.offset, last - first, first - self.start))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class FinishedBlocks:
    """Blocks of one request whose KV is complete: places first_block, first_block + 1, ... of its block table."""

    request: PrefillRequest
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One step. `reused` are the cached prefixes of the requests that were admitted for it: these blocks are finished already."""

    chunks: tuple[PrefillChunk, ...]
    reused: tuple[FinishedBlocks, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_new for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """What a step did for one request. With `token`, the first output token, prefill is done."""

    request: PrefillRequest
    blocks: FinishedBlocks | None
    token: Token | None


def check_request(request: PrefillRequest, max_model_len: int) -> None:
    """Raises PromptTooLong or BadRequest for one that can never run."""
    if not 0 < request.num_prompt_tokens <= request.num_tokens:
        raise BadRequest(f"request {request.request_id}: {request.num_prompt_tokens} prompt tokens of {request.num_tokens}")
    if request.num_tokens >= max_model_len:
        raise PromptTooLong(f"{request.num_tokens} tokens leave no room for output; the model's context is {max_model_len}")
    wrong = _wrong_items(request.items, request.num_tokens)
    if wrong:
        raise BadRequest(f"request {request.request_id}: {wrong}")


def _wrong_items(items: Sequence[MMItem], num_tokens: int) -> str:
    """What is wrong with a prompt's placeholder ranges; empty when they are in order, do not overlap and lie in the prompt."""
    end = 0
    for item in items:
        if item.num_tokens < 1 or item.offset < end or item.offset + item.num_tokens > num_tokens:
            return f"image range [{item.offset}, {item.offset + item.num_tokens}) does not fit after token {end} of {num_tokens}"
        end = item.offset + item.num_tokens
    return ""
