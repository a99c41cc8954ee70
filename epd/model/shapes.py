"""Names and shapes of a model's tensors, which of them are used side by side, and how many numbers they are.

As checkpoints store them: [out, in], and packed experts, the only ones of three dimensions, [experts, out, in], which published
checkpoints have as [experts, in, out]. Does not know files, devices or torch: memory is planned with this before torch is there.
"""

from __future__ import annotations

import math

from epd.model.config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]


def text_prefix(config: ModelConfig) -> str:
    """What the names of the language model's tensors begin with."""
    return "model.language_model." if config.vision else "model."


def text_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of the language model's tensors."""
    text, prefix = config.text, text_prefix(config)
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (text.vocab_size, text.hidden_size),
        f"{prefix}norm.weight": (text.hidden_size,),
    }
    if not text.tie_word_embeddings:
        shapes["lm_head.weight"] = (text.vocab_size, text.hidden_size)
    for layer in range(text.num_layers):
        for name, shape in (_attention_shapes(text) | _feed_forward_shapes(text, layer)).items():
            shapes[f"{prefix}layers.{layer}.{name}"] = shape
    return shapes


def _attention_shapes(text: TextConfig) -> Shapes:
    """Of one layer, its norms among them."""
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
    }
    if text.attention_bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"self_attn.{name}.bias"] = shapes[f"self_attn.{name}.weight"][:1]
    return shapes


def _feed_forward_shapes(text: TextConfig, layer: int) -> Shapes:
    experts, width = text.experts_of(layer), text.hidden_size
    if experts is None:
        return _gated_shapes("mlp.", width, text.intermediate_size)
    shapes: Shapes = {"mlp.gate.weight": (experts.num_experts, width)}
    if experts.is_packed:
        shapes["mlp.experts.gate_up_proj"] = (experts.num_experts, 2 * experts.intermediate_size, width)
        shapes["mlp.experts.down_proj"] = (experts.num_experts, width, experts.intermediate_size)
    else:
        for i in range(experts.num_experts):
            shapes |= _gated_shapes(f"mlp.experts.{i}.", width, experts.intermediate_size)
    return shapes


def _gated_shapes(prefix: str, width: int, inner: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (inner, width),
        f"{prefix}up_proj.weight": (inner, width),
        f"{prefix}down_proj.weight": (width, inner),
    }


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
    """Tensors that are one product where they lie one below the other, since they have the same input; a layer's experts."""
    text = config.text
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    groups: list[tuple[str, ...]] = []
    for layer in range(text.num_layers):
        prefix = f"{text_prefix(config)}layers.{layer}."
        groups.append(tuple(f"{prefix}{name}.weight" for name in attention))
        if text.attention_bias:
            groups.append(tuple(f"{prefix}{name}.bias" for name in attention))
        experts = text.experts_of(layer)
        if experts is None:
            groups.append((f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"))
        elif not experts.is_packed:
            groups += expert_groups(experts, prefix)
    return groups


def expert_groups(experts: ExpertsConfig, prefix: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Gate and up of one expert after the other, and down of one after the other, of experts that are not packed."""
    names = [f"{prefix}mlp.experts.{i}." for i in range(experts.num_experts)]
    gate_up = tuple(f"{name}{part}_proj.weight" for name in names for part in ("gate", "up"))
    return gate_up, tuple(f"{name}down_proj.weight" for name in names)


def attention_share(config: ModelConfig) -> float:
    """Arithmetic of one token's attending to another, all layers, as a share of what a token takes in linear layers."""
    text = config.text
    attention = text.num_layers * text.num_heads * text.head_dim * 2  # multiplications with a key and with a value
    return attention / sum(linear_numbers(text, layer) for layer in range(text.num_layers))


def active_share(config: ModelConfig) -> float:
    """Of the numbers of all matrices, those that take part in one token: all of them but for experts that it does not choose."""
    text = config.text
    if text.experts is None:
        return 1.0
    unchosen = (text.experts.num_experts - text.experts.num_chosen) * 3 * text.hidden_size * text.experts.intermediate_size
    active = sum(linear_numbers(text, layer) for layer in range(text.num_layers)) + text.vocab_size * text.hidden_size
    return active / (active + len(text.experts.layers) * unchosen)


def linear_numbers(text: TextConfig, layer: int) -> int:
    """Numbers of a layer's matrices that a token is multiplied with: of experts, those that it chooses."""
    attention = sum(math.prod(shape) for shape in _attention_shapes(text).values() if len(shape) == 2)
    experts, inner, router = text.experts_of(layer), text.intermediate_size, 0
    if experts is not None:
        inner, router = experts.num_chosen * experts.intermediate_size, experts.num_experts * text.hidden_size
    return attention + 3 * text.hidden_size * inner + router


def count_numbers(shapes: Shapes) -> int:
    """Of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())
