"""The runners of an emulated device: as long as the profile says, and tokens that prove that the right blocks were attended to.

A slot of the KV pool holds one word, the running sum of `epd.emulated.tokens` after its token; a row of embedding is one word.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from epd.emulated.cost import preprocess_s, work_of
from epd.emulated.device import EmulatedDevice, Work
from epd.emulated.tokens import Words, drawn, embedding_rows, terms
from epd.step import PENDING, ImageInput, SequenceStep, StepOutput, StepPlan
from gpu.deferred import Deferred
from gpu.host_pool import HostPool
from protocol.messages import RequestId, Token

WORD_BYTES = 8
_SEED_MASK = (1 << 64) - 1


class EmulatedTextRunner:
    """A TextRunner. `stage` is "prefill" or "decode": who of the process asks the device."""

    def __init__(self, device: EmulatedDevice, memory: HostPool, block_size: int, stage: str) -> None:
        self._device = device
        self._slots: Words = memory.array(np.uint64, (block_size,)).view(np.uint64).reshape(-1)
        self._block_size = block_size
        self._stage = stage
        self._last: dict[RequestId, int] = {}  # what the step before drew

    def execute(self, plan: StepPlan) -> Deferred[StepOutput]:
        if any(sequence.sample is not None and sequence.sample.sampling.guide for sequence in plan.sequences):
            raise ValueError("an emulated device has no logits to guide")
        work = self._device.launch(Work(self._stage, text=work_of(plan)))
        tokens = self._compute(plan)
        return _Finished(work, StepOutput(tokens, 0.0))

    def close(self) -> None:
        del self._slots

    def _compute(self, plan: StepPlan) -> tuple[Token | None, ...]:
        """Store the sums of all new tokens; draw where a token is asked for. Sequences with one new token go together."""
        singles = [i for i, sequence in enumerate(plan.sequences) if len(sequence.token_ids) == 1 and not sequence.embeddings]
        sums = np.zeros(len(plan.sequences), np.uint64)
        if singles:
            sums[singles] = self._store_singles([plan.sequences[i] for i in singles])
        for i in set(range(len(plan.sequences))) - set(singles):
            sums[i] = self._store_chunk(plan.sequences[i])
        seeds = np.array(
            [sequence.sample.sampling.seed & _SEED_MASK if sequence.sample else 0 for sequence in plan.sequences], np.uint64
        )
        ids = drawn(sums, seeds).tolist()
        self._last = {
            sequence.request_id: token_id
            for sequence, token_id in zip(plan.sequences, ids, strict=True)
            if sequence.sample is not None
        }
        return tuple(
            Token(token_id) if sequence.sample is not None else None
            for sequence, token_id in zip(plan.sequences, ids, strict=True)
        )

    def _store_singles(self, sequences: Sequence[SequenceStep]) -> Words:
        positions = np.array([sequence.num_computed_tokens for sequence in sequences], np.int64)
        places = [(int(position), sequence.block_table) for position, sequence in zip(positions, sequences, strict=True)]
        before = np.array([self._slot(table, place - 1) if place else -1 for place, table in places], np.int64)
        here = np.array([self._slot(table, place) for place, table in places], np.int64)
        values = np.array([self._token_of(sequence) for sequence in sequences], np.int64).astype(np.uint64)
        sums = np.where(before < 0, np.uint64(0), self._slots[before]) + terms(values, positions.astype(np.uint64))
        self._slots[here] = sums
        return sums

    def _store_chunk(self, sequence: SequenceStep) -> np.uint64:
        start, num_new = sequence.num_computed_tokens, len(sequence.token_ids)
        values = sequence.token_ids.astype(np.int64).astype(np.uint64)
        for span in sequence.embeddings:
            values[span.offset : span.offset + len(span.rows)] = span.rows[:, 0]
        places = np.arange(start, start + num_new)
        sums = np.cumsum(terms(values, places.astype(np.uint64)), dtype=np.uint64)
        if start:
            sums += self._slots[self._slot(sequence.block_table, start - 1)]
        self._slots[
            sequence.block_table[places // self._block_size].astype(np.int64) * self._block_size + places % self._block_size
        ] = sums
        return np.uint64(sums[-1])

    def _token_of(self, sequence: SequenceStep) -> int:
        token_id = int(sequence.token_ids[0])
        return self._last[sequence.request_id] if token_id == PENDING else token_id

    def _slot(self, table: npt.NDArray[np.int32], place: int) -> int:
        return int(table[place // self._block_size]) * self._block_size + place % self._block_size


class EmulatedVisionRunner:
    """A VisionRunner. Image files are not looked into: the gateway has read their headers."""

    def __init__(self, device: EmulatedDevice, memory: HostPool, block_rows: int) -> None:
        self._device = device
        self._memory = memory
        self._rows: Words = memory.array(np.uint64, (block_rows,)).view(np.uint64)
        self._block_rows = block_rows

    def preprocess(self, image: ImageInput) -> Any:
        """Rows already: what an image is encoded to is a function of its name. Takes as long as patches would."""
        frames, rows, columns = image.grid
        time.sleep(preprocess_s(self._device.profile, frames * rows * columns))
        return embedding_rows(image.mm_hash, image.num_tokens)

    def encode_patches(
        self, patches: Sequence[Any], grids: Sequence[tuple[int, int, int]], block_ids: Sequence[Sequence[int]]
    ) -> Deferred[tuple[list[int] | Exception, ...]]:
        counts = tuple(t * h * w for (t, h, w), each in zip(grids, patches, strict=True) if not isinstance(each, Exception))
        work = self._device.launch(Work("encode", patches=counts))
        stored = tuple(
            each if isinstance(each, Exception) else self._store(each, ids) for each, ids in zip(patches, block_ids, strict=True)
        )
        return _Finished(work, stored)

    def close(self) -> None:
        del self._rows

    def _store(self, rows: Words, block_ids: Sequence[int]) -> list[int]:
        blocks = np.zeros(len(block_ids) * self._block_rows, np.uint64)
        blocks[: len(rows)] = rows[:, 0]
        self._rows[list(block_ids)] = blocks.reshape(-1, self._block_rows)
        return self._memory.checksum(block_ids)


class _Finished(Deferred[Any]):
    """A result that is known, and may be told when the device would have come to it."""

    def __init__(self, work: Work, result: Any) -> None:
        self._work = work
        self._result = result

    def value(self) -> Any:
        self._work.done.result()
        return self._result
