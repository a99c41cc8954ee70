"""Stage actors with runners that can be checked: their KV is the tokens themselves, so a wrong block is a wrong token.

A block holds [block_size] pairs (token, position). The next token is a function of everything in the context, read back from the
pool; whoever attends to a stale, missing or foreign block draws another token than `expected_tokens` says.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epd.cache.block_pool import BlockPool
from epd.cache.encoder_cache import EncoderCache
from epd.clock import Clock, monotonic
from epd.decode.actor import DecodeActor
from epd.decode.scheduler import DecodeConfig, DecodeScheduler
from epd.encode.actor import EncodeActor
from epd.encode.batcher import EncodeBatcher
from epd.errors import BadImage
from epd.microkernel.system import System
from epd.prefill.actor import PrefillActor
from epd.prefill.config import PrefillConfig
from epd.prefill.embeddings import EmbeddingFetcher
from epd.prefill.scheduler import PrefillScheduler
from epd.stage import StageActor
from epd.step import PENDING, FloatArray, ImageInput, SequenceStep, StepOutput, StepPlan
from epd.transfer.receiver import Receiver
from epd.transfer.sender import Sender
from gpu.cpu import CpuBackend
from gpu.host_pool import HostPool
from gpu.pool import Pool, PoolSpec
from protocol.messages import MMItem, RequestId, Sampling, Token

VOCAB = 1000
EOS = VOCAB  # never drawn
BLOCK_SIZE = 4
BLOCK_BYTES = BLOCK_SIZE * 2 * 8
KV_LAYOUT = 7
WIDTH = 6
ROWS = 2  # of an embedding block
EMBEDDING_BLOCK_BYTES = ROWS * WIDTH * 4
EMBEDDING_LAYOUT = 8
MAX_LEN = 64


def next_token(context: Sequence[int], seed: int) -> int:
    """What the runner draws after a context; a placeholder counts as the embedding that took its place."""
    return zlib.crc32(repr((tuple(context), seed)).encode()) % VOCAB


def expected_tokens(prompt: Sequence[int], num: int, *, seed: int = 0) -> list[int]:
    context = list(prompt)
    for _ in range(num):
        context.append(next_token(context, seed))
    return context[len(prompt) :]


def embedding_of(data: bytes, num_tokens: int) -> FloatArray:
    """Rows [num_tokens, WIDTH] that a picture of these bytes is encoded to: whole numbers, so that they survive as tokens."""
    start = zlib.crc32(data) % 10_000
    return (np.arange(num_tokens * WIDTH, dtype=np.float32) + start).reshape(num_tokens, WIDTH)


def with_images(prompt: Sequence[int], items: Sequence[MMItem], images: Sequence[bytes]) -> list[int]:
    """The prompt as the runner sees it, placeholders replaced."""
    seen = list(prompt)
    for item, data in zip(items, images, strict=True):
        rows = embedding_of(data, item.num_tokens)
        seen[item.offset : item.offset + item.num_tokens] = [int(row.sum()) for row in rows]
    return seen


class CheckedRunner:
    """A TextRunner over a pool of (token, position) pairs. With a `gate`, every step waits until it is opened."""

    def __init__(self, memory: HostPool, block_size: int = BLOCK_SIZE) -> None:
        self.num_steps = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.poison: RequestId | None = None  # no step that this request is in works
        self.num_ahead = 0  # sequences that were launched before their token was known
        self.on_step: Callable[[StepPlan], None] = lambda plan: None
        self._drawn: dict[RequestId, int] = {}
        self._kv = memory.array(np.int64, (block_size, 2)).view(np.int64)
        self._block_size = block_size

    def execute(self, plan: StepPlan) -> StepOutput:
        assert self.gate.wait(20), "nobody opened the gate"
        self.num_steps += 1
        self.on_step(plan)
        drawn, self._drawn = self._drawn, {}
        if self.error is not None:
            raise self.error
        if any(sequence.request_id == self.poison for sequence in plan.sequences):
            raise ValueError("this is not to be computed")
        tokens = tuple(self._run(sequence, drawn) for sequence in plan.sequences)
        pairs = zip(plan.sequences, tokens, strict=True)
        self._drawn = {sequence.request_id: token.token_id for sequence, token in pairs if token is not None}
        return StepOutput(tokens, 0.0)

    def close(self) -> None:
        del self._kv

    def _run(self, sequence: SequenceStep, drawn: dict[RequestId, int]) -> Token | None:
        tokens = sequence.token_ids.astype(np.int64)
        if tokens[0] == PENDING:
            self.num_ahead += 1
            tokens[0] = drawn[sequence.request_id]
        for span in sequence.embeddings:
            tokens[span.offset : span.offset + len(span.rows)] = span.rows.sum(axis=1).astype(np.int64)
        start = sequence.num_computed_tokens
        places = np.arange(start, start + len(tokens))
        slots = self._slots(sequence.block_table, places)
        self._kv.reshape(-1, 2)[slots] = np.stack([tokens, places], axis=1)
        if sequence.sample is None:
            return None
        known = np.arange(start + len(tokens))
        pairs = self._kv.reshape(-1, 2)[self._slots(sequence.block_table, known)]
        assert (pairs[:, 1] == known).all(), f"{sequence.request_id} attends to positions {pairs[:, 1].tolist()}"
        return Token(next_token(pairs[:, 0].tolist(), sequence.sample.sampling.seed))

    def _slots(self, table: npt.NDArray[np.int32], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return table[places // self._block_size].astype(np.int64) * self._block_size + places % self._block_size


class CheckedVision:
    """A VisionRunner. A picture whose bytes begin with b"broken" fails alone."""

    def __init__(self, memory: HostPool) -> None:
        self._memory = memory
        self._rows = memory.array(np.float32, (ROWS, WIDTH))
        self.num_encoded = 0
        self.gate = threading.Event()
        self.gate.set()

    def preprocess(self, image: ImageInput) -> FloatArray | Exception:
        data = bytes(image.data)
        if data.startswith(b"broken"):
            return BadImage("this picture is broken")
        return embedding_of(data, image.num_tokens)

    def encode_patches(
        self,
        patches: Sequence[FloatArray | Exception],
        grids: Sequence[tuple[int, int, int]],
        block_ids: Sequence[Sequence[int]],
    ) -> tuple[list[int] | Exception, ...]:
        assert self.gate.wait(20), "nobody opened the gate"
        self.num_encoded += sum(not isinstance(each, Exception) for each in patches)
        return tuple(
            each if isinstance(each, Exception) else self._store(each, ids) for each, ids in zip(patches, block_ids, strict=True)
        )

    def _store(self, rows: FloatArray, block_ids: Sequence[int]) -> list[int]:
        blocks = np.zeros((len(block_ids) * ROWS, WIDTH), np.float32)
        blocks[: len(rows)] = rows
        self._rows[list(block_ids)] = blocks.reshape(-1, ROWS, WIDTH)
        return self._memory.checksum(block_ids)

    def close(self) -> None:
        del self._rows


@dataclass
class PrefillStage:
    actor: PrefillActor
    runner: CheckedRunner
    scheduler: PrefillScheduler
    blocks: BlockPool
    memory: HostPool


@dataclass
class DecodeStage:
    actor: DecodeActor
    runner: CheckedRunner
    scheduler: DecodeScheduler
    blocks: BlockPool
    memory: HostPool


@dataclass
class EncodeStage:
    actor: EncodeActor
    runner: CheckedVision
    cache: EncoderCache
    memory: HostPool


@dataclass
class Shared:
    """The pool that prefill and decode of one process share."""

    memory: HostPool
    blocks: BlockPool
    prefill: list[PrefillScheduler] = field(default_factory=list)
    decode: list[DecodeScheduler] = field(default_factory=list)
    actors: list[StageActor] = field(default_factory=list)

    def num_blocks_short(self, now: float, patience_s: float) -> int:
        return sum(prefill.num_blocks_short(now, patience_s) for prefill in self.prefill)

    def enter(self, actor: StageActor) -> None:
        self.actors.append(actor)
        for each in self.actors:
            each.neighbours = tuple(other for other in self.actors if other is not each)


def shared_pool(backend: CpuBackend, *, num_blocks: int = 32) -> Shared:
    return Shared(_kv_memory(backend, num_blocks), BlockPool(num_blocks))


async def add_prefill(
    system: System,
    backend: CpuBackend,
    *,
    num_blocks: int = 32,
    chunk: int = 8,
    budget: int = 16,
    allowed: str = "auto",
    shared: Shared | None = None,
    local: Sequence[Pool] = (),
    max_steps_in_flight: int = 1,
    pair_cost: float = 0.0,
    clock: Clock = monotonic,
) -> PrefillStage:
    memory = shared.memory if shared else _kv_memory(backend, num_blocks)
    blocks = shared.blocks if shared else BlockPool(num_blocks)
    runner = CheckedRunner(memory)
    config = PrefillConfig(BLOCK_SIZE, budget, chunk, chunk, 16, MAX_LEN, frozenset({EOS}), max_steps_in_flight, pair_cost)
    scheduler = PrefillScheduler(config, blocks)
    pools = [memory, *local]
    receiver = Receiver(system, backend, backend.open_stream("in"), allowed=allowed, local_pools=pools, clock=clock)
    actor = PrefillActor(
        scheduler=scheduler,
        blocks=blocks,
        memory=memory,
        sender=Sender(system.endpoint.worker, "kv", memory, blocks, backend.open_stream("reads")),
        receiver=receiver,
        fetcher=EmbeddingFetcher(
            system,
            receiver,
            allocate=lambda num_blocks: backend.allocate_scratch(num_blocks, EMBEDDING_BLOCK_BYTES),
            block_rows=ROWS,
            width=WIDTH,
            layout=EMBEDDING_LAYOUT,
        ),
        runner=runner,
        stream=backend.open_stream("prefill"),
        checksum_stream=backend.open_stream("sums"),
        merge_size=1,
        num_beside=lambda: sum(decode.num_running for decode in shared.decode) if shared else 0,
        clock=clock,
    )
    if shared:
        shared.prefill.append(scheduler)
        shared.enter(actor)
    await system.register("prefill", actor)
    return PrefillStage(actor, runner, scheduler, blocks, memory)


async def add_decode(
    system: System,
    backend: CpuBackend,
    *,
    num_blocks: int = 32,
    max_running: int = 16,
    allowed: str = "auto",
    shared: Shared | None = None,
    max_steps_in_flight: int = 1,
    clock: Clock = monotonic,
) -> DecodeStage:
    memory = shared.memory if shared else _kv_memory(backend, num_blocks)
    blocks = shared.blocks if shared else BlockPool(num_blocks)
    runner = CheckedRunner(memory)
    config = DecodeConfig(BLOCK_SIZE, max_running, MAX_LEN, frozenset({EOS}), max_steps_in_flight)
    scheduler = DecodeScheduler(config, blocks)
    if shared:
        shared.decode.append(scheduler)
    receiver = Receiver(system, backend, backend.open_stream("in"), allowed=allowed, local_pools=[memory], clock=clock)
    actor = DecodeActor(
        scheduler=scheduler,
        blocks=blocks,
        memory=memory,
        receiver=receiver,
        runner=runner,
        stream=backend.open_stream("decode"),
        block_size=BLOCK_SIZE,
        merge_size=1,
        shares_pool=shared is not None,
        num_blocks_short=shared.num_blocks_short if shared else lambda now, patience_s: 0,
        clock=clock,
    )
    if shared:
        shared.enter(actor)
    await system.register("decode", actor)
    return DecodeStage(actor, runner, scheduler, blocks, memory)


async def add_encode(
    system: System,
    backend: CpuBackend,
    *,
    num_blocks: int = 16,
    max_patches: int = 64,
    clock: Clock = monotonic,
) -> EncodeStage:
    memory = backend.allocate_pool(PoolSpec(num_blocks, EMBEDDING_BLOCK_BYTES, "embedding", EMBEDDING_LAYOUT))
    cache = EncoderCache(BlockPool(num_blocks), block_rows=ROWS)
    runner = CheckedVision(memory)
    actor = EncodeActor(
        batcher=EncodeBatcher(max_patches=max_patches, max_images=8),
        cache=cache,
        memory=memory,
        sender=Sender(system.endpoint.worker, "embedding", memory, cache, backend.open_stream("reads")),
        runner=runner,
        stream=backend.open_stream("encode"),
        preprocess_stream=backend.open_stream("preprocess"),
        lease_s=20.0,
        clock=clock,
    )
    await system.register("encode", actor)
    return EncodeStage(actor, runner, cache, memory)


def item(data: bytes, offset: int, num_tokens: int) -> MMItem:
    """An image of num_tokens x 1 patches with no merging."""
    return MMItem(f"hash-{zlib.crc32(data)}", offset, num_tokens, 1, num_tokens, 1)


def sampling(max_tokens: int, *, seed: int = 0) -> Sampling:
    return Sampling(max_tokens=max_tokens, seed=seed)


def tokens_as_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def _kv_memory(backend: CpuBackend, num_blocks: int) -> HostPool:
    return backend.allocate_pool(PoolSpec(num_blocks, BLOCK_BYTES, "kv", KV_LAYOUT))
