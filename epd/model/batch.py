"""A step plan as the arrays that a forward pass works on: all tokens in one row per token, sequences one after the other.

Sequences with a single new token come first: one attention kernel serves them all. Longer ones (chunks of a prompt) follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epd.step import PENDING, EmbeddingSpan, SequenceStep, StepPlan
from protocol.messages import RequestId


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's rows [start, end) of the batch, of which `context_len` tokens have KV once the rows' own is stored."""

    start: int
    end: int
    context_len: int
    block_table: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: npt.NDArray[np.int64]  # [num_tokens]
    positions: npt.NDArray[np.int32]  # [3, num_tokens]
    slots: npt.NDArray[np.int64]  # [num_tokens]
    num_single: int  # rows [0, num_single) are sequences with one new token
    block_tables: npt.NDArray[np.int32]  # [num_single, max_blocks]
    context_lens: npt.NDArray[np.int32]  # [num_single]
    chunks: tuple[Chunk, ...]
    embeddings: tuple[tuple[int, EmbeddingSpan], ...]  # row at which each span begins
    sampled: tuple[int, ...]  # places in the plan of the sequences to sample for
    sampled_rows: npt.NDArray[np.int64]  # their last rows

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def fill_in(plan: StepPlan, drawn: Mapping[RequestId, int]) -> StepPlan:
    """The plan with its PENDING tokens known: `drawn` are those of the step before. Raises ValueError where one is missing."""
    return StepPlan(tuple(_known(sequence, drawn) for sequence in plan.sequences))


def make_batch(plan: StepPlan, block_size: int) -> Batch:
    """Raises ValueError for a sequence without tokens or with too short a block table: a mistake of the scheduler."""
    singles = [i for i, sequence in enumerate(plan.sequences) if len(sequence.token_ids) == 1]
    longer = [i for i, sequence in enumerate(plan.sequences) if len(sequence.token_ids) != 1]
    num_tokens = plan.num_tokens
    token_ids, slots = np.empty(num_tokens, np.int64), np.empty(num_tokens, np.int64)
    positions = np.empty((3, num_tokens), np.int32)
    context_lens = np.empty(len(singles), np.int32)
    used = [plan.sequences[i].num_computed_tokens // block_size + 1 for i in singles]
    block_tables = np.zeros((len(singles), max(used, default=0)), np.int32)
    chunks: list[Chunk] = []
    embeddings: list[tuple[int, EmbeddingSpan]] = []
    last_rows = np.empty(len(plan.sequences), np.int64)
    for row, i in enumerate(singles):
        sequence = plan.sequences[i]
        computed, table = sequence.num_computed_tokens, sequence.block_table
        _check(sequence, block_size)
        token_ids[row] = sequence.token_ids[0]
        positions[:, row] = sequence.positions[:, 0]
        slots[row] = table[computed // block_size] * block_size + computed % block_size
        block_tables[row, : used[row]] = table[: used[row]]
        context_lens[row] = computed + 1
        last_rows[i] = row
        if sequence.embeddings:
            embeddings += [(row + span.offset, span) for span in sequence.embeddings]
    start = len(singles)
    for i in longer:
        sequence = plan.sequences[i]
        _check(sequence, block_size)
        end, context_len = start + len(sequence.token_ids), sequence.num_computed_tokens + len(sequence.token_ids)
        token_ids[start:end] = sequence.token_ids
        positions[:, start:end] = sequence.positions
        index = np.arange(sequence.num_computed_tokens, context_len)
        slots[start:end] = sequence.block_table[index // block_size].astype(np.int64) * block_size + index % block_size
        chunks.append(Chunk(start, end, context_len, np.ascontiguousarray(sequence.block_table, np.int32)))
        embeddings += [(start + span.offset, span) for span in sequence.embeddings]
        last_rows[i] = end - 1
        start = end
    sampled = tuple(i for i, sequence in enumerate(plan.sequences) if sequence.sample is not None)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        num_single=len(singles),
        block_tables=block_tables,
        context_lens=context_lens,
        chunks=tuple(chunks),
        embeddings=tuple(embeddings),
        sampled=sampled,
        sampled_rows=last_rows[list(sampled)],
    )


def _known(sequence: SequenceStep, drawn: Mapping[RequestId, int]) -> SequenceStep:
    if len(sequence.token_ids) != 1 or sequence.token_ids[0] != PENDING:
        return sequence
    if sequence.request_id not in drawn:
        raise ValueError(f"request {sequence.request_id} is to go on with a token that the last step did not draw")
    return replace(sequence, token_ids=np.array([drawn[sequence.request_id]], np.int32))


def _check(sequence: SequenceStep, block_size: int) -> None:
    num_new = len(sequence.token_ids)
    if num_new == 0:
        raise ValueError(f"request {sequence.request_id} has no tokens in this step")
    if (sequence.num_computed_tokens + num_new - 1) // block_size >= len(sequence.block_table):
        raise ValueError(
            f"request {sequence.request_id}: {sequence.num_computed_tokens} + {num_new} tokens "
            f"do not fit {len(sequence.block_table)} blocks of {block_size}"
        )
