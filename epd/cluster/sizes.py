"""How large the pools of a worker are and how long a request may be: from the model, the memory and the operator's wishes.

On a host several workers share the memory, so each takes a modest share of what is free. A device belongs to one worker up to
`--memory-fraction`: weights, working memory and embeddings are counted out, and KV gets what is left (`epd.cluster.budget`).

Pure numbers; what is decided here is printed at start.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from epd.cluster.budget import BudgetItem, gib, largest_image_rows, weight_items, working_items
from epd.config import EngineConfig
from epd.errors import BadConfig
from epd.model.config import ModelConfig

EMBEDDING_BLOCK_ROWS = 64
DEFAULT_KV_TOKENS = 65_536
DEFAULT_EMBEDDING_ROWS = 16_384
KV_SHARE = 1 / 8  # of the free memory of a host: several workers share it
EMBEDDING_SHARE = 1 / 16
_HOST_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a worker finds before it loads anything."""

    total_bytes: int
    free_bytes: int
    fraction: float  # of `total_bytes` that this process may take; does not count on a host
    dtype_bytes: int  # of a number in weights, activations, KV and embeddings
    is_host: bool

    @classmethod
    def of_host(cls, free_bytes: int) -> DeviceMemory:
        return cls(free_bytes, free_bytes, 1.0, _HOST_FLOAT_BYTES, is_host=True)

    @property
    def allowed_bytes(self) -> int:
        return min(int(self.total_bytes * self.fraction), self.free_bytes)


@dataclass(frozen=True, slots=True)
class Sizes:
    max_model_len: int
    num_kv_blocks: int  # 0 on a device that neither prefills nor decodes
    kv_block_bytes: int
    num_embedding_blocks: int  # 0 on a device that does not encode
    embedding_block_bytes: int
    budget: tuple[BudgetItem, ...] = ()  # of a device: all that this process will take, and what stays unused

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def embedding_bytes(self) -> int:
        return self.num_embedding_blocks * self.embedding_block_bytes


def decide(model: ModelConfig, engine: EngineConfig, *, memory: DeviceMemory, roles: Collection[str]) -> Sizes:
    """Sizes of one worker's pools.

    Raises:
        BadConfig: what was asked for does not fit, with the numbers.
    """
    if engine.max_model_len > model.max_position_embeddings:
        raise BadConfig(f"--max-model-len {engine.max_model_len}: the model was made for {model.max_position_embeddings} tokens")
    return _decide_host(model, engine, memory) if memory.is_host else _decide_device(model, engine, memory, roles)


def budget_lines(sizes: Sizes) -> list[str]:
    """The budget of a device for people: one line per item, and their sum, which is what this process may take."""
    if not sizes.budget:
        return []
    lines = [f"{gib(item.num_bytes):>12}  {item.name}{f' ({item.note})' if item.note else ''}" for item in sizes.budget]
    return [*lines, f"{gib(sum(item.num_bytes for item in sizes.budget)):>12}  in all, that this process may take"]


# --- a host ---------------------------------------------------------------------------------------------------------


def _decide_host(model: ModelConfig, engine: EngineConfig, memory: DeviceMemory) -> Sizes:
    block_bytes = _kv_block_bytes(model, engine, memory)
    wanted_len = engine.max_model_len or model.max_position_embeddings
    if engine.kv_bytes:
        num_blocks = _asked_kv_blocks(engine, block_bytes)
    else:
        num_blocks = _affordable_kv_blocks(engine, block_bytes, wanted_len, memory.free_bytes)
    # One block of a request's last token may be partly filled, so the longest request is a whole number of blocks.
    max_model_len = min(wanted_len, num_blocks * engine.block_size)
    _check_asked_len(engine, max_model_len, num_blocks, block_bytes)
    row_bytes = model.embedding_width * memory.dtype_bytes
    return Sizes(
        max_model_len=max_model_len,
        num_kv_blocks=num_blocks,
        kv_block_bytes=block_bytes,
        num_embedding_blocks=_num_embedding_blocks(model, engine, row_bytes, memory.free_bytes),
        embedding_block_bytes=EMBEDDING_BLOCK_ROWS * row_bytes,
    )


def _affordable_kv_blocks(engine: EngineConfig, block_bytes: int, max_len: int, free_bytes: int) -> int:
    wanted = -(-max(DEFAULT_KV_TOKENS, 2 * max_len) // engine.block_size)
    affordable = int(free_bytes * KV_SHARE) // block_bytes
    if affordable < 1:
        raise BadConfig(
            f"{free_bytes / 2**20:.0f} MiB of memory are free, too little for KV blocks of {block_bytes / 2**20:.2f} MiB"
        )
    return min(wanted, affordable)


# --- a device -------------------------------------------------------------------------------------------------------


def _decide_device(model: ModelConfig, engine: EngineConfig, memory: DeviceMemory, roles: Collection[str]) -> Sizes:
    row_bytes = model.embedding_width * memory.dtype_bytes
    encodes = "encode" in roles and model.vision is not None
    embedding_blocks = _num_embedding_blocks(model, engine, row_bytes, memory.allowed_bytes) if encodes else 0
    embedding_block_bytes = EMBEDDING_BLOCK_ROWS * row_bytes
    items = [*weight_items(model, roles, memory.dtype_bytes), *working_items(model, engine, roles, memory.dtype_bytes)]
    if embedding_blocks:
        note = f"{embedding_blocks * EMBEDDING_BLOCK_ROWS} rows"
        items.append(BudgetItem("embedding pool", embedding_blocks * embedding_block_bytes, note))
    left = memory.allowed_bytes - sum(item.num_bytes for item in items)
    block_bytes = _kv_block_bytes(model, engine, memory)
    kv = _no_kv(engine.max_model_len or model.max_position_embeddings)
    if {"prefill", "decode"} & set(roles):
        kv = _device_kv(model, engine, block_bytes, left, gathers="prefill" in roles)
    if left < kv.least_bytes:
        raise BadConfig(_does_not_fit(items, kv, memory))
    if kv.num_blocks:
        _check_asked_len(engine, kv.max_model_len, kv.num_blocks, block_bytes)
        note = f"{kv.num_blocks * engine.block_size} tokens, {kv.max_model_len} in one request at most"
        items.append(BudgetItem("KV gathered for the longest prompt", kv.gathered_bytes))
        items.append(BudgetItem("KV pool", kv.num_blocks * block_bytes, note))
    items.append(BudgetItem("unused", memory.allowed_bytes - sum(item.num_bytes for item in items)))
    return Sizes(
        max_model_len=kv.max_model_len,
        num_kv_blocks=kv.num_blocks,
        kv_block_bytes=block_bytes,
        num_embedding_blocks=embedding_blocks,
        embedding_block_bytes=embedding_block_bytes,
        budget=tuple(item for item in items if item.num_bytes or item.name == "unused"),
    )


@dataclass(frozen=True, slots=True)
class _KV:
    """The KV of a device: how much of it, and how little would be too little."""

    max_model_len: int
    num_blocks: int
    gathered_bytes: int  # one layer's KV of the longest prompt, side by side for the attention of a chunk
    least_bytes: int
    least_tokens: int


def _no_kv(max_model_len: int) -> _KV:
    return _KV(max_model_len, 0, 0, 0, 0)


def _device_kv(model: ModelConfig, engine: EngineConfig, block_bytes: int, left: int, *, gathers: bool) -> _KV:
    """All that is left, or what was asked for; at least one request of the asked length, or of one prefill step."""
    size = engine.block_size
    wanted_len = engine.max_model_len or model.max_position_embeddings
    wanted_blocks = -(-wanted_len // size)
    gathered = block_bytes // model.text.num_layers if gathers else 0  # per block of the longest request
    least_tokens = engine.max_model_len or min(wanted_len, engine.token_budget)
    least_blocks = -(-least_tokens // size)
    if engine.kv_bytes:
        num_blocks = _asked_kv_blocks(engine, block_bytes)
        least_blocks = num_blocks
    elif left >= wanted_blocks * (block_bytes + gathered):
        num_blocks = (left - wanted_blocks * gathered) // block_bytes
    else:
        num_blocks = max(left, 0) // (block_bytes + gathered)
    longest = min(wanted_blocks, num_blocks)
    return _KV(
        max_model_len=min(wanted_len, num_blocks * size),
        num_blocks=num_blocks,
        gathered_bytes=longest * gathered,
        least_bytes=least_blocks * block_bytes + min(wanted_blocks, least_blocks) * gathered,
        least_tokens=least_blocks * size if engine.kv_bytes else least_tokens,
    )


def _does_not_fit(items: list[BudgetItem], kv: _KV, memory: DeviceMemory) -> str:
    parts = [f"{item.name} {gib(item.num_bytes)}" for item in items]
    if kv.least_bytes:
        parts.append(f"KV of {kv.least_tokens} tokens {gib(kv.least_bytes)}")
    if memory.free_bytes < int(memory.total_bytes * memory.fraction):
        limit = f"that are free of {gib(memory.total_bytes)}: let go of what else is on the device"
    else:
        limit = f"allowed, {memory.fraction:g} of {gib(memory.total_bytes)}: raise --memory-fraction"
    return (
        f"the model does not fit: {' + '.join(parts)} > {gib(memory.allowed_bytes)} {limit}, lower --token-budget, "
        "--max-patches, --max-running, --embedding-mib, --kv-mib or --max-model-len, or give the stages a device each"
    )


# --- both -----------------------------------------------------------------------------------------------------------


def _kv_block_bytes(model: ModelConfig, engine: EngineConfig, memory: DeviceMemory) -> int:
    num_bytes = memory.dtype_bytes
    for extent in model.kv_block_shape(engine.block_size):
        num_bytes *= extent
    return num_bytes


def _asked_kv_blocks(engine: EngineConfig, block_bytes: int) -> int:
    num_blocks = engine.kv_bytes // block_bytes
    if num_blocks < 1:
        raise BadConfig(f"--kv-mib {engine.kv_bytes / 2**20:g} does not hold one block of {block_bytes / 2**20:.2f} MiB")
    return num_blocks


def _check_asked_len(engine: EngineConfig, max_model_len: int, num_blocks: int, block_bytes: int) -> None:
    if engine.max_model_len and max_model_len < engine.max_model_len:
        wanted_bytes = -(-engine.max_model_len // engine.block_size) * block_bytes
        raise BadConfig(
            f"--max-model-len {engine.max_model_len} takes {wanted_bytes / 2**20:.0f} MiB of KV, and the pool has "
            f"{num_blocks * block_bytes / 2**20:.0f} MiB: raise --kv-mib or lower the length"
        )


def _num_embedding_blocks(model: ModelConfig, engine: EngineConfig, row_bytes: int, shared_bytes: int) -> int:
    """Room for the largest image twice over, so that one can be encoded while another is fetched."""
    if model.image is None:
        return 0
    if engine.embedding_bytes:
        rows = engine.embedding_bytes // row_bytes
    else:
        rows = min(max(DEFAULT_EMBEDDING_ROWS, 2 * largest_image_rows(model)), int(shared_bytes * EMBEDDING_SHARE) // row_bytes)
    num_blocks = rows // EMBEDDING_BLOCK_ROWS
    if num_blocks < 1:
        raise BadConfig(
            f"the embedding pool would hold {rows} rows, less than a block of {EMBEDDING_BLOCK_ROWS}: raise --embedding-mib"
        )
    return num_blocks
