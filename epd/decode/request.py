"""One request's state in decode, and what a step's plan and its outcome say about requests.

Owns: the numbers and the token buffer of one request. The scheduler moves them; everybody else reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from epd.step import PENDING, Int32Array
from protocol.messages import MMItem, RequestId, Sampling, Token


class DecodeState(Enum):
    WAITING = auto()  # holds no blocks
    RECEIVING = auto()  # holds blocks that its KV is being pulled into
    RUNNING = auto()
    LEAVING = auto()  # gone, while a step writes into its blocks
    GONE = auto()


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """The first part is given by whoever adds the request, the rest belongs to the scheduler."""

    request_id: RequestId
    epoch: int
    token_ids: Int32Array  # [n], the prompt and what was generated before, without the token that prefill draws
    num_prompt_tokens: int
    items: tuple[MMItem, ...]
    sampling: Sampling
    deadline: float  # on the clock that `now` is read from
    salt: str = ""
    arrived_at: float = 0.0

    state: DecodeState = DecodeState.WAITING
    order: int = 0  # of arrival
    hashes: tuple[int, ...] = ()  # of all full blocks so far
    block_table: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0  # found in this worker's prefix cache: need not be pulled
    num_tokens: int = 0  # all tokens that are known
    num_computed_tokens: int = 0  # tokens with KV in the pool; one less than num_tokens while running
    num_published_blocks: int = 0
    num_steps_in_flight: int = 0
    buffer: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))  # [>= num_tokens, one more with a PENDING token]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def next_position(self) -> int:
        """Index of the token that the next step feeds: what the last step in flight draws, if there is one."""
        return self.num_computed_tokens + self.num_steps_in_flight

    @property
    def needs_history(self) -> bool:
        """Whether drawing a token takes knowing all tokens before it, the last one included."""
        sampling = self.sampling
        return bool(
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty or sampling.guide
        )

    @property
    def prompt_token_ids(self) -> Int32Array:
        return self.buffer[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> Int32Array:
        return self.buffer[self.num_prompt_tokens : self.num_tokens]

    def output_until(self, position: int) -> Int32Array:
        """Output tokens before and at a position of the sequence, which may be that of the PENDING token."""
        return self.buffer[self.num_prompt_tokens : position + 1]

    def append(self, token_id: int) -> None:
        self._put(token_id)
        self.num_tokens += 1

    def expect(self) -> None:
        """The next token is being drawn: until it is appended, PENDING is in its place."""
        self._put(PENDING)

    def _put(self, token_id: int) -> None:
        if self.num_tokens == len(self.buffer):
            grown = np.empty(max(64, 2 * len(self.buffer)), np.int32)
            grown[: self.num_tokens] = self.buffer
            self.buffer = grown
        self.buffer[self.num_tokens] = token_id


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks for a request's prompt. What is to be pulled are blocks [first_block, first_block + len(block_ids)) of its table."""

    request: DecodeRequest
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One sequence of a step: feed `token_id` (or PENDING) at `position`, an index into the sequence, and draw the next."""

    request: DecodeRequest
    token_id: int
    position: int


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step. `preempted` have left the scheduler to make room and are to be prefilled again."""

    steps: tuple[DecodeStep, ...]
    preempted: tuple[DecodeRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """Output token number `index` of a request. With a finish reason the request has left the scheduler."""

    request: DecodeRequest
    index: int
    token: Token
