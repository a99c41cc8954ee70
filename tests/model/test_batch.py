"""A plan as arrays: order of rows, slots, what is sampled, and refusal of plans that no scheduler should make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from epd.model.batch import make_batch
from epd.step import EmbeddingSpan, SampleRequest, SequenceStep, StepPlan
from protocol.messages import RequestId, Sampling


def _sequence(
    tokens: Sequence[int], computed: int, table: Sequence[int], *, sample: bool = True, spans: tuple[EmbeddingSpan, ...] = ()
) -> SequenceStep:
    positions = np.tile(np.arange(computed, computed + len(tokens), dtype=np.int32), (3, 1))
    request = SampleRequest(Sampling(), np.empty(0, np.int32), np.empty(0, np.int32)) if sample else None
    return SequenceStep(
        RequestId(f"r{computed}"), np.array(tokens, np.int32), computed, positions, np.array(table, np.int32), spans, request
    )


def test_single_tokens_come_first() -> None:
    span = EmbeddingSpan(1, np.zeros((2, 4), np.float32))
    plan = StepPlan(
        (
            _sequence([10, 11, 12], 3, [7, 5], spans=(span,)),
            _sequence([20], 8, [1, 2, 3], sample=False),
            _sequence([30], 3, [9]),
            _sequence([40, 41], 0, [4]),
        )
    )
    batch = make_batch(plan, block_size=4)
    assert batch.token_ids.tolist() == [20, 30, 10, 11, 12, 40, 41]
    assert batch.positions[0].tolist() == [8, 3, 3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [12, 39, 31, 20, 21, 16, 17]
    assert batch.num_single == 2
    assert batch.context_lens.tolist() == [9, 4]
    assert batch.block_tables.tolist() == [[1, 2, 3], [9, 0, 0]]
    assert [(chunk.start, chunk.end, chunk.context_len) for chunk in batch.chunks] == [(2, 5, 6), (5, 7, 2)]
    assert batch.embeddings == ((3, span),)
    assert batch.sampled == (0, 2, 3)
    assert batch.sampled_rows.tolist() == [4, 1, 6]


def test_a_table_longer_than_needed_is_no_harm() -> None:
    batch = make_batch(StepPlan((_sequence([1], 0, [3, 8, 8, 8]), _sequence([1], 5, [0, 1, 8]))), block_size=4)
    assert batch.block_tables.tolist() == [[3, 0], [0, 1]]


@pytest.mark.parametrize("tokens", [[1], [1, 2]])
def test_too_short_a_table_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit 1 blocks of 4"):
        make_batch(StepPlan((_sequence(tokens, 4, [0]),)), block_size=4)


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        make_batch(StepPlan((_sequence([], 4, [0, 1]),)), block_size=4)


def test_an_empty_plan() -> None:
    batch = make_batch(StepPlan(()), block_size=4)
    assert batch.num_tokens == 0
    assert batch.sampled == ()
