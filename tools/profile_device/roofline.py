"""A profile out of data sheets: what a device could do with a model, and no device has shown it.

Times are bytes by the memory's rate or arithmetic by the matrix rate, whichever is longer, each taken at a share of its peak that
good kernels reach. The shares are assumptions, written into the profile's source.
"""

from __future__ import annotations

from dataclasses import dataclass

from epd.emulated.profile import CopyCosts, Curve, Model, Profile, TextCosts, VisionCosts
from epd.model.config import ModelConfig, TextConfig, VisionConfig
from epd.model.shapes import active_share, count_numbers, linear_numbers, text_shapes, vision_shapes

_DTYPE_BYTES = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class Chip:
    """From its data sheet."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    flop_per_s: float  # dense bfloat16


CHIPS = {
    "h100": Chip("NVIDIA H100 SXM", 80 * 10**9, 3.35e12, 989e12),
    "h200": Chip("NVIDIA H200 SXM", 141 * 10**9, 4.8e12, 989e12),
}


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the peak, that are assumed to be reached."""

    decode_bytes: float = 0.70
    attention_bytes: float = 0.65
    prefill_flop: float = 0.50
    attention_flop: float = 0.35
    vision_flop: float = 0.40
    copy_bytes: float = 0.36  # a byte that moves is read and written
    step_s: float = 0.0004  # what a step takes besides
    preprocess_s_per_patch: float = 4e-6  # a JPEG or PNG file to patches on one core of a host


def roofline(chip: Chip, config: ModelConfig, name: str, shares: Shares | None = None) -> Profile:
    """The profile of `chip` with a Qwen3-VL model in bfloat16."""
    shares = shares or Shares()
    if config.vision is None:
        raise ValueError(f"{name} has no vision tower")
    text = config.text
    weights = count_numbers(text_shapes(config))
    tower = count_numbers(vision_shapes(config.vision))
    kv_token_bytes = text.num_layers * 2 * text.num_kv_heads * text.head_dim * _DTYPE_BYTES
    used = weights - text.vocab_size * text.hidden_size  # the embedding table is looked up, not multiplied
    return Profile(
        device=chip.name,
        provenance="roofline",
        source=f"computed from data sheets, not measured on any device; shares of the peaks: {shares}",
        memory_bytes=chip.memory_bytes,
        model=Model(
            name=name,
            kv_token_bytes=kv_token_bytes,
            embedding_row_bytes=config.embedding_width * _DTYPE_BYTES,
            weight_bytes=weights * _DTYPE_BYTES,
            vision_weight_bytes=tower * _DTYPE_BYTES,
            active_share=active_share(config),
        ),
        text=TextCosts(
            rows=_rows(text, used, chip, shares),
            pair_s=4 * text.num_heads * text.head_dim * text.num_layers / (chip.flop_per_s * shares.attention_flop),
            context_s=kv_token_bytes / (chip.bytes_per_s * shares.attention_bytes),
        ),
        vision=_vision(config.vision, tower, chip, shares),
        copies=CopyCosts(latency_s=150e-6, bytes_per_s=chip.bytes_per_s * shares.copy_bytes),
    )


def _rows(text: TextConfig, num_used: int, chip: Chip, shares: Shares) -> Curve:
    """A step by its rows: as long as the weights that any of them needs take to be read, or as the arithmetic takes."""
    byte_s, flop_s = 1 / (chip.bytes_per_s * shares.decode_bytes), 1 / (chip.flop_per_s * shares.prefill_flop)
    if text.experts is None:
        weights_s = num_used * _DTYPE_BYTES * byte_s
        return _flat_then_rising(max(2.0, weights_s / (2 * num_used * flop_s)), weights_s, shares.step_s)
    e = text.experts
    of_experts = len(e.layers) * 3 * e.intermediate_size * text.hidden_size  # numbers, of one in every layer
    row_s = 2 * flop_s * (sum(linear_numbers(text, i) for i in range(text.num_layers)) + text.vocab_size * text.hidden_size)
    points: list[tuple[float, float]] = []
    rows = 1.0
    while not points or rows * row_s < 64 * points[0][1]:
        # Each row finds its experts whatever the others found: so many of them are read on average.
        num_read = e.num_experts * (1 - (1 - e.num_chosen / e.num_experts) ** rows)
        weights_s = (num_used - (e.num_experts - num_read) * of_experts) * _DTYPE_BYTES * byte_s
        points.append((rows, max(weights_s, rows * row_s) + shares.step_s))
        rows *= 2
    return tuple(points)


def _flat_then_rising(knee: float, weights_s: float, step_s: float) -> Curve:
    """As long as the weights' bytes take up to the knee, in proportion to the rows from there."""
    return ((1.0, weights_s + step_s), (knee, weights_s + step_s), (64 * knee, 64 * weights_s + step_s))


def _vision(vision: VisionConfig, num_weights: int, chip: Chip, shares: Shares) -> VisionCosts:
    """Mergers see a row for every merge_size**2 patches; position tables are looked up."""
    width, joined = vision.hidden_size, vision.merge_size**2
    merged = width * joined
    mergers = (1 + len(vision.deepstack_layers)) * (merged * merged + merged * vision.out_hidden_size)
    blocks = num_weights - mergers - vision.num_position_embeddings * width
    patch_s = 2 * (blocks + mergers / joined) / (chip.flop_per_s * shares.vision_flop)
    weights_s = num_weights * _DTYPE_BYTES / (chip.bytes_per_s * shares.decode_bytes)
    knee = max(2.0, weights_s / patch_s)
    return VisionCosts(
        patches=_flat_then_rising(knee, weights_s, shares.step_s),
        pair_s=4 * width * vision.depth / (chip.flop_per_s * shares.attention_flop),
        preprocess=((0.0, 0.0), (10_000.0, 10_000 * shares.preprocess_s_per_patch)),
    )
