"""Puts the stages of one process together: backend, weights, pools, schedulers, actors.

The heavy half (`load`) touches no event loop and may run on any thread; the light half (`StageParts.actors`) wires what was
loaded to a running system. Prefill and decode of one process share one weight copy and one KV pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from epd.cache.block_pool import BlockPool
from epd.cache.encoder_cache import EncoderCache
from epd.clock import Clock
from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS, Sizes, budget_lines
from epd.cluster.stack import Report, Stack, open_stack
from epd.config import ServeConfig
from epd.decode.actor import DecodeActor
from epd.decode.scheduler import DecodeConfig, DecodeScheduler
from epd.devices import step_limits, tokens_beside_decode
from epd.encode.actor import EncodeActor
from epd.encode.batcher import EncodeBatcher
from epd.errors import BadConfig
from epd.microkernel.system import System
from epd.model.config import ModelConfig
from epd.model.shapes import active_share, attention_share
from epd.prefill.actor import PrefillActor
from epd.prefill.config import PrefillConfig
from epd.prefill.embeddings import EmbeddingFetcher
from epd.prefill.scheduler import PrefillScheduler
from epd.stage import StageActor
from epd.step import TextRunner, VisionRunner
from epd.transfer.receiver import Receiver
from epd.transfer.sender import Sender
from gpu.errors import OutOfMemory
from gpu.pool import Pool, PoolSpec
from gpu.stream import Stream

MAX_IMAGES_PER_STEP = 64


@dataclass(slots=True)
class StageParts:
    """What a process needs for its stages, loaded."""

    config: ServeConfig
    model: ModelConfig
    sizes: Sizes
    stack: Stack
    vision_runner: VisionRunner | None = None
    text_runners: dict[str, TextRunner] = field(default_factory=dict)  # by stage
    streams: dict[str, Stream] = field(default_factory=dict)  # by stage
    kv_memory: Pool | None = None
    embedding_memory: Pool | None = None

    def actors(self, system: System, clock: Clock) -> list[StageActor]:
        """The stage actors of this process, in the order in which a request meets them."""
        local = [pool for pool in (self.kv_memory, self.embedding_memory) if pool is not None]
        actors: list[StageActor] = []
        if "encode" in self.config.roles and self.model.vision is not None:
            actors.append(self._encode(system, clock))
        if self.kv_memory is None:
            return actors
        kv_blocks = BlockPool(self.sizes.num_kv_blocks)
        prefill = self._prefill_scheduler(kv_blocks) if "prefill" in self.config.roles else None
        decode = self._decode_scheduler(kv_blocks) if "decode" in self.config.roles else None
        users: list[StageActor] = []
        if prefill is not None:
            users.append(self._prefill(system, clock, kv_blocks, prefill, decode, local))
        if decode is not None:
            users.append(self._decode(system, clock, kv_blocks, decode, prefill, local))
        for user in users:
            user.neighbours = tuple(other for other in users if other is not user)
        return [*actors, *users]

    def _encode(self, system: System, clock: Clock) -> EncodeActor:
        assert self.embedding_memory is not None
        assert self.vision_runner is not None
        engine = self.config.engine
        reads = self.stack.backend.open_stream("encode reads")
        cache = EncoderCache(BlockPool(self.sizes.num_embedding_blocks), block_rows=EMBEDDING_BLOCK_ROWS)
        return EncodeActor(
            batcher=EncodeBatcher(max_patches=engine.max_patches, max_images=MAX_IMAGES_PER_STEP),
            cache=cache,
            memory=self.embedding_memory,
            sender=Sender(system.endpoint.worker, "embedding", self.embedding_memory, cache, reads),
            runner=self.vision_runner,
            stream=self.streams["encode"],
            preprocess_stream=self.stack.backend.open_stream("preprocess"),
            lease_s=engine.lease_s,
            clock=clock,
        )

    def _prefill_scheduler(self, blocks: BlockPool) -> PrefillScheduler:
        engine = self.config.engine
        return PrefillScheduler(
            PrefillConfig(
                block_size=engine.block_size,
                token_budget=engine.token_budget,
                budget_beside_decode=budget_beside_decode(self.config, self.model),
                max_chunk_tokens=engine.max_chunk_tokens,
                max_running=engine.max_running,
                max_model_len=self.sizes.max_model_len,
                eos_token_ids=frozenset(self.model.eos_token_ids),
                max_steps_in_flight=self.stack.steps_in_flight,
                pair_cost=attention_share(self.model),
            ),
            blocks,
        )

    def _prefill(
        self,
        system: System,
        clock: Clock,
        blocks: BlockPool,
        scheduler: PrefillScheduler,
        decode: DecodeScheduler | None,
        local: list[Pool],
    ) -> PrefillActor:
        assert self.kv_memory is not None
        receiver = self._receiver(system, "prefill transfer", local, clock)
        reads = self.stack.backend.open_stream("prefill reads")  # checksums, and blocks for sockets
        return PrefillActor(
            scheduler=scheduler,
            blocks=blocks,
            memory=self.kv_memory,
            sender=Sender(system.endpoint.worker, "kv", self.kv_memory, blocks, reads),
            receiver=receiver,
            fetcher=EmbeddingFetcher(
                system,
                receiver,
                allocate=lambda num: self.stack.backend.allocate_scratch(num, self.sizes.embedding_block_bytes),
                block_rows=EMBEDDING_BLOCK_ROWS,
                width=self.stack.embedding_width,
                layout=self.model.embedding_layout(self.stack.backend.block_format),
            ),
            runner=self.text_runners["prefill"],
            stream=self.streams["prefill"],
            checksum_stream=reads,
            merge_size=self._merge_size,
            num_beside=(lambda: decode.num_running) if decode is not None else (lambda: 0),
            clock=clock,
        )

    def _decode_scheduler(self, blocks: BlockPool) -> DecodeScheduler:
        engine = self.config.engine
        return DecodeScheduler(
            DecodeConfig(
                block_size=engine.block_size,
                max_running=engine.max_running,
                max_model_len=self.sizes.max_model_len,
                eos_token_ids=frozenset(self.model.eos_token_ids),
                max_steps_in_flight=self.stack.steps_in_flight,
            ),
            blocks,
        )

    def _decode(
        self,
        system: System,
        clock: Clock,
        blocks: BlockPool,
        scheduler: DecodeScheduler,
        prefill: PrefillScheduler | None,
        local: list[Pool],
    ) -> DecodeActor:
        assert self.kv_memory is not None
        engine = self.config.engine
        return DecodeActor(
            scheduler=scheduler,
            blocks=blocks,
            memory=self.kv_memory,
            receiver=self._receiver(system, "decode transfer", local, clock),
            runner=self.text_runners["decode"],
            stream=self.streams["decode"],
            block_size=engine.block_size,
            merge_size=self._merge_size,
            shares_pool=prefill is not None,
            num_blocks_short=prefill.num_blocks_short if prefill is not None else lambda now, patience_s: 0,
            clock=clock,
        )

    def _receiver(self, system: System, name: str, local: list[Pool], clock: Clock) -> Receiver:
        stream = self.stack.backend.open_stream(name)
        return Receiver(system, self.stack.backend, stream, allowed=self.config.link.transfer, local_pools=local, clock=clock)

    @property
    def _merge_size(self) -> int:
        return self.model.vision.merge_size if self.model.vision is not None else 1

    def close(self) -> None:
        self.stack.close()


def budget_beside_decode(config: ServeConfig, model: ModelConfig) -> int:
    """Tokens of a prefill step while requests decode on the same worker."""
    return config.engine.budget_beside_decode or tokens_beside_decode(step_limits(config.device), active_share(model))


def load(config: ServeConfig, folder: Path, model: ModelConfig, report: Report) -> StageParts:
    """Weights, memory and runners for the stages of this process; takes seconds to minutes and tells `report` how far it is.

    Raises:
        BadCheckpoint, BadConfig: and then nothing is left behind.
    """
    roles = config.roles
    stack = open_stack(config, folder, model)
    try:
        sizes = stack.decide(roles)
        for line in budget_lines(sizes):
            report(line)
        stack.load(roles, report)
        parts = StageParts(config, model, sizes, stack)
        block_format = stack.backend.block_format
        if "encode" in roles and model.vision is not None:
            layout = model.embedding_layout(block_format)
            spec = PoolSpec(sizes.num_embedding_blocks, sizes.embedding_block_bytes, "embedding", layout)
            parts.embedding_memory = stack.backend.allocate_pool(spec)
            parts.streams["encode"] = stack.stage_stream("encode")
            parts.vision_runner = stack.vision_runner(parts.embedding_memory, parts.streams["encode"], report)
            report(f"embedding pool: {sizes.embedding_bytes / 2**20:.0f} MiB")
        if {"prefill", "decode"} & set(roles):
            layout = model.kv_layout(config.engine.block_size, block_format)
            parts.kv_memory = stack.backend.allocate_pool(PoolSpec(sizes.num_kv_blocks, sizes.kv_block_bytes, "kv", layout))
            num_tokens = sizes.num_kv_blocks * config.engine.block_size
            report(f"KV pool: {sizes.kv_bytes / 2**20:.0f} MiB for {num_tokens} tokens, at most {sizes.max_model_len} a request")
            for stage in ("prefill", "decode"):
                if stage in roles:
                    stream = parts.streams[stage] = stack.stage_stream(stage)
                    parts.text_runners[stage] = stack.text_runner(parts.kv_memory, stage, stream, report)
    except OutOfMemory as error:
        stack.close()
        raise BadConfig(f"{error}, or lower --kv-mib and --embedding-mib") from error
    except BaseException:
        stack.close()
        raise
    return parts
