"""What a worker takes of a device beside its pools: weights, and the working memory of its steps. Estimates, from shapes alone.

Working memory, with d bytes a number, H hidden size, I intermediate size, V vocabulary:

- prefill, over `token_budget` tokens, and decode, over `max_running`: per token d * (3H + 2 * q + kv + 3I), q and kv being the
  widths of queries and of keys and values: the residual, its norm and what a layer adds; queries, keys and values as the product
  leaves them, and attention's output; gate, up and their product. Of a layer with experts, of which a token takes k, in their
  place k * (H + I) and two numbers for each expert: what they made of it, and how likely they are.
- logits: at most `max_running` rows of V float32 numbers, and 1,800 bytes per entry of V to draw from some rows at a time.
- prefill with images: the largest image's embedding, as it was fetched.
- encode, over `max_patches` patches or the largest image: per patch d * max(8H, 2H + 2I), the wider of attention (residual, norm,
  queries, keys and values before and after rotation, output) and the two-layer network; 4 bytes * (head_dim + heads) for angles
  and attention's normalizers; twice the grey levels and places that were sent.
- libraries: what cuBLAS, cuDNN, kernels' code and captured graphs take.

Pure numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from epd.config import EngineConfig
from epd.model.config import ModelConfig
from epd.model.shapes import count_numbers, text_shapes, vision_shapes

_LIBRARY_BYTES = 512 << 20
_STAGE_LIBRARY_BYTES = 256 << 20  # 64 MiB for each stream that multiplies, of which decode has one more to capture on; graphs
_FLOAT_BYTES = 4
_DRAW_BYTES = 1800  # per entry of the vocabulary: weights, ranks and sums of the rows that are drawn from together
_PLACE_BYTES = 20  # of a patch: row and column, those of its image's last patch, a share of where its row goes


@dataclass(frozen=True, slots=True)
class BudgetItem:
    name: str
    num_bytes: int
    note: str = ""


def weight_items(model: ModelConfig, roles: Collection[str], dtype_bytes: int) -> list[BudgetItem]:
    items: list[BudgetItem] = []
    if {"prefill", "decode"} & set(roles):
        items.append(BudgetItem("weights of the language model", count_numbers(text_shapes(model)) * dtype_bytes))
    if "encode" in roles and model.vision is not None:
        items.append(BudgetItem("weights of the vision tower", count_numbers(vision_shapes(model.vision)) * dtype_bytes))
    return items


def working_items(model: ModelConfig, engine: EngineConfig, roles: Collection[str], dtype_bytes: int) -> list[BudgetItem]:
    """All but the KV that prefill gathers, which grows with the pool."""
    items: list[BudgetItem] = []
    if "encode" in roles and model.vision is not None:
        patches = max(engine.max_patches, _largest_image_patches(model))
        items.append(BudgetItem("encode steps", encode_bytes(model, patches, dtype_bytes), f"{patches} patches"))
    if "prefill" in roles:
        num_bytes = _text_step_bytes(model, engine, engine.token_budget, dtype_bytes)
        items.append(BudgetItem("prefill steps", num_bytes, f"{engine.token_budget} tokens"))
        if model.vision is not None:
            rows = largest_image_rows(model)
            items.append(BudgetItem("fetched embeddings", rows * model.embedding_width * dtype_bytes, f"{rows} rows"))
    if "decode" in roles:
        num_bytes = _text_step_bytes(model, engine, engine.max_running, dtype_bytes)
        items.append(BudgetItem("decode steps", num_bytes, f"{engine.max_running} requests"))
    num_stages = len({"encode", "prefill", "decode"} & set(roles))
    items.append(BudgetItem("libraries", _LIBRARY_BYTES + num_stages * _STAGE_LIBRARY_BYTES))
    return items


def encode_bytes(model: ModelConfig, num_patches: int, dtype_bytes: int) -> int:
    """Working memory of an encode step."""
    vision = model.vision
    if vision is None:
        return 0
    widest = max(8 * vision.hidden_size, 2 * vision.hidden_size + 2 * vision.intermediate_size)
    sent = vision.in_channels * vision.patch_size**2 + _PLACE_BYTES
    per_patch = dtype_bytes * widest + _FLOAT_BYTES * (vision.hidden_size // vision.num_heads + vision.num_heads) + 2 * sent
    return num_patches * per_patch


def largest_image_rows(model: ModelConfig) -> int:
    """Rows of embedding of the largest image that preprocessing lets through."""
    if model.image is None:
        return 0
    return model.image.max_pixels // (model.image.patch_size * model.image.merge_size) ** 2


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _largest_image_patches(model: ModelConfig) -> int:
    return model.image.max_pixels // model.image.patch_size**2 if model.image is not None else 0


def _text_step_bytes(model: ModelConfig, engine: EngineConfig, num_tokens: int, dtype_bytes: int) -> int:
    text = model.text
    queries, keys_values = text.num_heads * text.head_dim, 2 * text.num_kv_heads * text.head_dim
    per_token = 3 * text.hidden_size + 2 * queries + keys_values + 3 * text.dense_size
    if text.experts is not None:
        taken = text.experts.num_chosen * (text.hidden_size + text.experts.intermediate_size)
        per_token += taken + 2 * text.experts.num_experts
    logits = (min(num_tokens, engine.max_running) * _FLOAT_BYTES + _DRAW_BYTES) * text.vocab_size
    return num_tokens * per_token * dtype_bytes + logits
