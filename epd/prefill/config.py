"""The limits that a prefill scheduler keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from epd.errors import BadConfig


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Raises BadConfig for limits under which nothing could be computed."""

    block_size: int
    token_budget: int  # new tokens in one step, at most
    budget_beside_decode: int  # the same while anybody decodes on this worker
    max_chunk_tokens: int  # of one request in one step
    max_running: int  # requests in one step
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_steps_in_flight: int = 1
    pair_cost: float = 0.0  # first guess at `epd.chunking.ChunkCost.pair`; 0: budgets are counted in tokens alone

    def __post_init__(self) -> None:
        budget = min(self.token_budget, self.budget_beside_decode)
        if min(self.block_size, budget, self.max_chunk_tokens, self.max_running, self.max_steps_in_flight) < 1:
            raise BadConfig("prefill limits must be at least 1")

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
