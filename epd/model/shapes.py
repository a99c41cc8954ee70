"""Names and shapes of a model's tensors, which of them are used side by side, and how many numbers they are.

As checkpoints store them ([out, in]). Does not know files, devices or torch: memory is planned with this before torch is there.
"""

from __future__ import annotations

import math

from epd.model.config import ModelConfig, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]


def text_prefix(config: ModelConfig) -> str:
    """What the names of the language model's tensors begin with."""
    return "model.language_model." if config.vision else "model."


def text_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of the language model's tensors, as checkpoints store them ([out, in])."""
    text, prefix = config.text, text_prefix(config)
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (text.vocab_size, text.hidden_size),
        f"{prefix}norm.weight": (text.hidden_size,),
    }
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, text.hidden_size)
    for layer in range(text.num_layers):
        shapes.update({f"{prefix}layers.{layer}.{name}": shape for name, shape in _text_layer_shapes(text).items()})
    return shapes


def _text_layer_shapes(text: TextConfig) -> Shapes:
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (text.hidden_size,),
        "post_attention_layernorm.weight": (text.hidden_size,),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "self_attn.q_proj.weight": (queries, text.hidden_size),
        "self_attn.k_proj.weight": (keys, text.hidden_size),
        "self_attn.v_proj.weight": (keys, text.hidden_size),
        "self_attn.o_proj.weight": (text.hidden_size, queries),
        "mlp.gate_proj.weight": (text.intermediate_size, text.hidden_size),
        "mlp.up_proj.weight": (text.intermediate_size, text.hidden_size),
        "mlp.down_proj.weight": (text.hidden_size, text.intermediate_size),
    }
    if text.attention_bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"self_attn.{name}.bias"] = shapes[f"self_attn.{name}.weight"][:1]
    return shapes


def vision_shapes(vision: VisionConfig) -> Shapes:
    """Names and shapes of the vision tower's tensors."""
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: Shapes = {
        "patch_embed.proj.weight": (width, *patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision.num_position_embeddings, width),
        **_merger_shapes("merger.", vision, norm_width=width),
    }
    for i in range(len(vision.deepstack_layers)):
        shapes.update(_merger_shapes(f"deepstack_merger_list.{i}.", vision, norm_width=width * vision.merge_size**2))
    for i in range(vision.depth):
        for name, (rows, columns) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.linear_fc1": (inner, width),
            "mlp.linear_fc2": (width, inner),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (width,)
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def _merger_shapes(prefix: str, vision: VisionConfig, *, norm_width: int) -> Shapes:
    merged = vision.hidden_size * vision.merge_size**2
    return {
        f"{prefix}norm.weight": (norm_width,),
        f"{prefix}norm.bias": (norm_width,),
        f"{prefix}linear_fc1.weight": (merged, merged),
        f"{prefix}linear_fc1.bias": (merged,),
        f"{prefix}linear_fc2.weight": (vision.out_hidden_size, merged),
        f"{prefix}linear_fc2.bias": (vision.out_hidden_size,),
    }


def text_groups(config: ModelConfig) -> list[tuple[str, ...]]:
    """Tensors that have the same input and are one product where they lie one below the other."""
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    groups: list[tuple[str, ...]] = []
    for layer in range(config.text.num_layers):
        prefix = f"{text_prefix(config)}layers.{layer}."
        groups.append(tuple(f"{prefix}{name}.weight" for name in attention))
        groups.append((f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"))
        if config.text.attention_bias:
            groups.append(tuple(f"{prefix}{name}.bias" for name in attention))
    return groups


def attention_share(config: ModelConfig) -> float:
    """Arithmetic of one token's attending to another, all layers, as a share of what a token takes in linear layers."""
    text = config.text
    linear = text.num_layers * sum(math.prod(shape) for shape in _text_layer_shapes(text).values() if len(shape) == 2)
    attention = text.num_layers * text.num_heads * text.head_dim * 2  # multiplications with a key and with a value
    return attention / linear


def count_numbers(shapes: Shapes) -> int:
    """Of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())
