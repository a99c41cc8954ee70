"""How large the pools of a worker are and how long a request may be: from the model, the memory and the operator's wishes.

Pure numbers; what is decided here is printed at start.
"""

from __future__ import annotations

from dataclasses import dataclass

from epd.config import EngineConfig
from epd.errors import BadConfig
from epd.model.config import ModelConfig

EMBEDDING_BLOCK_ROWS = 64
DEFAULT_KV_TOKENS = 65_536
DEFAULT_EMBEDDING_ROWS = 16_384
KV_SHARE = 1 / 8  # of the free memory: several workers share a host
EMBEDDING_SHARE = 1 / 16
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    max_model_len: int
    num_kv_blocks: int
    kv_block_bytes: int
    num_embedding_blocks: int
    embedding_block_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def embedding_bytes(self) -> int:
        return self.num_embedding_blocks * self.embedding_block_bytes


def decide(model: ModelConfig, engine: EngineConfig, *, free_bytes: int) -> Sizes:
    """Sizes of one worker's pools.

    Raises:
        BadConfig: what was asked for does not fit, with the numbers.
    """
    block_bytes = _FLOAT_BYTES
    for extent in model.kv_block_shape(engine.block_size):
        block_bytes *= extent
    wanted_len = min(engine.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    if engine.max_model_len > model.max_position_embeddings:
        raise BadConfig(f"--max-model-len {engine.max_model_len}: the model was made for {model.max_position_embeddings} tokens")
    num_blocks = _num_kv_blocks(engine, block_bytes, wanted_len, free_bytes)
    # One block of a request's last token may be partly filled, so the longest request is a whole number of blocks.
    max_model_len = min(wanted_len, num_blocks * engine.block_size)
    if engine.max_model_len and max_model_len < engine.max_model_len:
        wanted_bytes = -(-engine.max_model_len // engine.block_size) * block_bytes
        raise BadConfig(
            f"--max-model-len {engine.max_model_len} takes {wanted_bytes / 2**20:.0f} MiB of KV, and the pool has "
            f"{num_blocks * block_bytes / 2**20:.0f} MiB: raise --kv-mib or lower the length"
        )
    row_bytes = model.embedding_width * _FLOAT_BYTES
    return Sizes(
        max_model_len=max_model_len,
        num_kv_blocks=num_blocks,
        kv_block_bytes=block_bytes,
        num_embedding_blocks=_num_embedding_blocks(model, engine, row_bytes, free_bytes),
        embedding_block_bytes=EMBEDDING_BLOCK_ROWS * row_bytes,
    )


def _num_kv_blocks(engine: EngineConfig, block_bytes: int, max_len: int, free_bytes: int) -> int:
    if engine.kv_bytes:
        num_blocks = engine.kv_bytes // block_bytes
        if num_blocks < 1:
            raise BadConfig(f"--kv-mib {engine.kv_bytes / 2**20:g} does not hold one block of {block_bytes / 2**20:.2f} MiB")
        return num_blocks
    wanted = -(-max(DEFAULT_KV_TOKENS, 2 * max_len) // engine.block_size)
    affordable = int(free_bytes * KV_SHARE) // block_bytes
    if affordable < 1:
        raise BadConfig(
            f"{free_bytes / 2**20:.0f} MiB of memory are free, too little for KV blocks of {block_bytes / 2**20:.2f} MiB"
        )
    return min(wanted, affordable)


def _num_embedding_blocks(model: ModelConfig, engine: EngineConfig, row_bytes: int, free_bytes: int) -> int:
    """Room for the largest image twice over, so that one can be encoded while another is fetched."""
    if model.image is None:
        return 0
    largest = model.image.max_pixels // (model.image.patch_size * model.image.merge_size) ** 2
    if engine.embedding_bytes:
        rows = engine.embedding_bytes // row_bytes
    else:
        rows = min(max(DEFAULT_EMBEDDING_ROWS, 2 * largest), int(free_bytes * EMBEDDING_SHARE) // row_bytes)
    num_blocks = rows // EMBEDDING_BLOCK_ROWS
    if num_blocks < 1:
        raise BadConfig(
            f"the embedding pool would hold {rows} rows, less than a block of {EMBEDDING_BLOCK_ROWS}: raise --embedding-mib"
        )
    return num_blocks
