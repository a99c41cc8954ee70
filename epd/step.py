"""One step of a stage: the plan that a scheduler hands to a runner, and what the runner answers.

A plan holds plain NumPy arrays and numbers: no memory of the pool, no device. A runner computes the KV of `token_ids` into the
blocks of `block_table`, and for the sequences that have reached their last known token (`sample` set) draws the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from epd.errors import BadRequest
from gpu.deferred import Now
from protocol.messages import RequestId, Sampling, Token

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

# A token id that the host does not know yet: what the step before drew for this request. Steps of a runner are executed in the
# order in which they were submitted, so that the runner, or the device itself, can put it in.
PENDING = -1


def read_token_ids(data: bytes) -> Int32Array:
    """Token ids as messages carry them, int32 in little endian; raises BadRequest for a number of bytes that has none."""
    if len(data) % 4:
        raise BadRequest(f"{len(data)} bytes are no token ids")
    return np.frombuffer(data, dtype="<i4")


class Rows(Protocol):
    """Embedding rows [num_rows, (1 + num_deepstack) * hidden_size]: the main embedding followed by the deepstack features.

    A NumPy array on the CPU, a torch tensor of the model's dtype on a device. Only the runner looks inside.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Rows: ...


@dataclass(frozen=True, slots=True)
class EmbeddingSpan:
    """Rows of image embedding that replace the placeholder tokens [offset, offset + len(rows)) of this step's chunk."""

    offset: int
    rows: Any  # Rows, as the runner of this device can read them


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What drawing one token needs besides logits."""

    sampling: Sampling
    prompt_token_ids: Int32Array  # for the repetition penalty
    # What was generated so far; the new token is number len(output_token_ids). The last one may be PENDING, but never where a
    # guide or a repetition, frequency or presence penalty needs to know it.
    output_token_ids: Int32Array
    # [ceil(vocab_size / 32)] bit i of number j: token 32 j + i may be drawn. The runner fills it in for guided requests.
    allowed: Int32Array | None = None


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's share of a step."""

    request_id: RequestId
    token_ids: Int32Array  # [num_new]; [PENDING] for what the step before drew for this request
    num_computed_tokens: int  # tokens whose KV is in the pool already
    positions: Int32Array  # [3, num_new]: time, height, width of M-RoPE; three equal rows for text models
    block_table: Int32Array  # [>= ceil((num_computed_tokens + num_new) / block_size)] block ids
    embeddings: tuple[EmbeddingSpan, ...] = ()
    sample: SampleRequest | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step has drawn."""

    tokens: tuple[Token | None, ...]  # of plan.sequences[i]; None where nothing was to be sampled
    elapsed_s: float  # by the device's clock on a GPU, by the host's on a CPU; 0 on an emulated device


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image to encode: the file's bytes and the grid that the gateway promised."""

    mm_hash: str
    data: bytes | memoryview
    grid: tuple[int, int, int]  # t, h, w in patches
    num_tokens: int


class TextRunner(Protocol):
    """What prefill and decode drive. Called on the stage's own stream, one step at a time."""

    def execute(self, plan: StepPlan) -> Now[StepOutput]:
        """Compute a step. Steps run in the order in which they are given; PENDING in one is a token of the one before it.

        Raises:
            ValueError: because of what a sequence asks; nothing of the step counts, and it may be tried again in parts.
            BadRequest: the same, and it is the client's fault.
            DeviceFailed: no step will work again; the stage ends.
        """

    def close(self) -> None: ...


class VisionRunner(Protocol):
    """What encode drives: files to patches on one stream, patches to rows on another, of different images at the same time."""

    def preprocess(self, image: ImageInput) -> Any:
        """Patches of one image, as this runner wants them, or the exception that says what is wrong with it."""

    def encode_patches(
        self,
        patches: Sequence[Any],
        grids: Sequence[tuple[int, int, int]],
        block_ids: Sequence[Sequence[int]],
    ) -> Now[tuple[list[int] | Exception, ...]]:
        """Write each image's rows to its blocks of the embedding pool, in order, zeros after the last.

        Args:
            patches: of each image, as `preprocess` made them; an exception passes through.
            grids: t, h, w of each image in patches.
            block_ids: of each image, as many blocks of EMBEDDING_BLOCK_ROWS rows as its embedding fills.

        Returns:
            Of each image the checksums of its blocks.
        """

    def close(self) -> None: ...
