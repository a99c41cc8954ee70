"""The runners that stages drive: a step plan in, tokens out; images in, embeddings out. All on the calling thread.

A runner belongs to one stage and its stream: it is not called from two threads at once. Models and weights may be
shared by several.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from epd.errors import BadConfig, BadImage
from epd.model.batch import fill_in, make_batch
from epd.model.config import ModelConfig
from epd.model.guides import Guides, restricted
from epd.model.preprocess import Grid, preprocess
from epd.model.sampler import sample
from epd.model.text import Buffers, TextModel
from epd.model.vision import VisionModel
from epd.model.weights import Weights
from epd.step import ImageInput, StepOutput, StepPlan
from gpu.backend import Backend
from gpu.host_pool import HostPool
from gpu.pool import Pool
from gpu.team import Team
from protocol.messages import RequestId, Token

FloatArray = npt.NDArray[np.float32]


class TextModelRunner:
    """Runs the steps of prefill or decode over the KV pool of its stage."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights | TextModel,
        backend: Backend,
        kv_pool: Pool,
        block_size: int,
        num_threads: int = 1,
        guides: Guides | None = None,
    ) -> None:
        """`weights`: the text role's, or another runner's `model`, to share one copy. BadConfig for a pool of other blocks.

        Without `guides`, steps with a guided request fail.
        """
        _require_cpu(backend)
        if kv_pool.layout != config.kv_layout(block_size, backend.block_format):
            raise BadConfig(f"the KV pool's blocks are not those of this model with {block_size} tokens a block")
        self.model = weights if isinstance(weights, TextModel) else TextModel(config, weights)
        self._kv: FloatArray = _host(kv_pool).array(np.float32, config.kv_block_shape(block_size)).view(np.float32)
        self._block_size = block_size
        self._buffers = Buffers(config.text)
        self._drawn: dict[RequestId, int] = {}  # by the last step
        self._guides = guides
        self._threads = _Threads(num_threads)
        self._team = Team(num_threads) if num_threads > 1 else None

    def execute(self, plan: StepPlan) -> StepOutput:
        """Raises ValueError for a plan that makes no sense, or whose PENDING token the last step did not draw."""
        started = time.perf_counter()
        drawn, self._drawn = self._drawn, {}
        logits, places = self._forward(fill_in(plan, drawn))
        tokens: list[Token | None] = [None] * len(plan.sequences)
        requests = restricted(self._guides, [plan.sequences[i] for i in places])
        for i, token in zip(places, sample(logits, requests), strict=True):
            tokens[i] = token
            self._drawn[plan.sequences[i].request_id] = token.token_id
        return StepOutput(tuple(tokens), time.perf_counter() - started)

    def logits(self, plan: StepPlan) -> FloatArray:
        """What `execute` would sample from, [num_sampled, vocab_size], for evaluation and tests; valid until the next call."""
        return self._forward(plan)[0]

    def close(self) -> None:
        """Let go of the pool's memory, the buffers and the threads."""
        del self._kv, self._buffers
        if self._team:
            self._team.close()

    def _forward(self, plan: StepPlan) -> tuple[FloatArray, Sequence[int]]:
        self._threads.apply()
        batch = make_batch(plan, self._block_size)
        return self.model.forward(batch, self._kv, self._buffers, self._team), batch.sampled


class VisionModelRunner:
    """Encodes images into the embedding pool of its stage, those of one call together."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights | VisionModel,
        backend: Backend,
        memory: Pool,
        block_rows: int,
        num_threads: int = 1,
    ) -> None:
        """`memory`: blocks of `block_rows` rows [config.embedding_width]. BadConfig for a model without a vision tower."""
        _require_cpu(backend)
        if config.vision is None or config.image is None:
            raise BadConfig(f"{config.architecture} has no vision tower to encode images with")
        self.model = weights if isinstance(weights, VisionModel) else VisionModel(config.vision, weights)
        self._image = config.image
        self._memory = _host(memory)
        self._rows = self._memory.array(np.float32, (block_rows, config.embedding_width)).view(np.float32)
        self._threads = _Threads(num_threads)
        self._team = Team(num_threads) if num_threads > 1 else None

    def preprocess(self, image: ImageInput) -> FloatArray | BadImage:
        """Patches of one image, or what is wrong with it. Touches no model: may run on any thread, while encode_patches runs."""
        try:
            return preprocess(image.data, image.grid, self._image)
        except BadImage as error:
            return error

    def encode_patches(
        self, patches: Sequence[FloatArray | Exception], grids: Sequence[Grid], block_ids: Sequence[Sequence[int]]
    ) -> tuple[list[int] | Exception, ...]:
        """As VisionRunner says."""
        self._threads.apply()
        good = [(each, grid) for each, grid in zip(patches, grids, strict=True) if not isinstance(each, Exception)]
        encoded = iter(self.model.forward([each for each, _ in good], [grid for _, grid in good], self._team) if good else [])
        return tuple(
            each if isinstance(each, Exception) else self._store(next(encoded), ids)
            for each, ids in zip(patches, block_ids, strict=True)
        )

    def _store(self, rows: FloatArray, block_ids: Sequence[int]) -> list[int]:
        block_rows = self._rows.shape[1]
        for place, block_id in enumerate(block_ids):
            part = rows[place * block_rows : (place + 1) * block_rows]
            self._rows[block_id, : len(part)] = part
            self._rows[block_id, len(part) :] = 0.0  # what the checksum covers is the same every time
        return self._memory.checksum(block_ids)

    def close(self) -> None:
        """Let go of the pool's memory and the threads."""
        del self._rows
        if self._team:
            self._team.close()


class _Threads:
    """How many threads torch's operators use. OpenMP keeps the number per thread, so the thread that computes sets it."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._applied_to = 0

    def apply(self) -> None:
        if self._applied_to != threading.get_ident():
            torch.set_num_threads(self._num_threads)
            self._applied_to = threading.get_ident()


def _require_cpu(backend: Backend) -> None:
    if backend.torch_device != "cpu":
        raise BadConfig(f"these runners compute on the CPU, not on {backend.torch_device}: epd.model.device has the others")


def _host(pool: Pool) -> HostPool:
    if not isinstance(pool, HostPool):
        raise BadConfig(f"a {type(pool).__name__} is not in host memory")
    return pool
