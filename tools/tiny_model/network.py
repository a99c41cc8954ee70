"""The network: Qwen3-VL's parameters from transformers, run by a lean forward pass made for training.

transformers encodes images one at a time and computes logits at every position; here the images of a batch share one
grid and go through the vision tower together, and logits are computed only where the model is to speak. The tests hold this
forward pass to transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from tools.tiny_model.batches import Batch
from tools.tiny_model.pixels import MERGE, PATCH, TEMPORAL_PATCH

WIDTH = 128


def model_config(token_ids: dict[str, int], vocab_size: int) -> Qwen3VLConfig:
    """The bundled model's shape; `token_ids` by the names that Qwen3VLConfig gives them."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "temporal_patch_size": TEMPORAL_PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        tie_word_embeddings=True,
        **token_ids,
    )


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the vision tower says: [images, merged patches, width] for the input and for each deepstack layer."""

    merged: Tensor
    deepstack: list[Tensor]


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward pass of a batch gives."""

    logits: Tensor  # [answer tokens, vocabulary]: what predicts `batch.tokens[batch.answers]`
    hidden: list[Tensor]  # after each text layer: [rows, length, width]
    features: ImageFeatures | None


def forward(model: Qwen3VLForConditionalGeneration, batch: Batch) -> Forward:
    """Runs vision tower and text layers over whole conversations at once."""
    text = model.model.language_model
    features = None if batch.pictures is None else image_features(model, batch.pictures.patches, batch.pictures.grid)
    hidden = text.embed_tokens(batch.tokens)  # [rows, length, width]
    if features is not None:
        where = batch.image_tokens[..., None]
        hidden = hidden.masked_scatter(where, features.merged)
    rope = text.rotary_emb(hidden, batch.positions)
    layers: list[Tensor] = []
    for i, layer in enumerate(text.layers):
        hidden = _text_layer(layer, hidden, rope)
        if features is not None and i < len(features.deepstack):
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(where, features.deepstack[i])
        layers.append(hidden)
    speaks = torch.zeros_like(batch.answers)
    speaks[:, :-1] = batch.answers[:, 1:]  # a token is predicted one position before its own
    spoken = _rms_norm(text.norm, hidden[speaks])
    return Forward(F.linear(spoken, text.embed_tokens.weight), layers, features)


def image_features(model: Qwen3VLForConditionalGeneration, patches: Tensor, grid: tuple[int, int]) -> ImageFeatures:
    """patches: [images, patches, PATCH_VALUES], all of one grid (patch rows, patch columns)."""
    vision = model.model.visual
    grid_thw = torch.tensor([[1, *grid]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=vision.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    projection = vision.patch_embed.proj
    hidden = F.linear(patches, projection.weight.flatten(1), projection.bias)
    hidden = hidden + (vision.pos_embed(indices) * weights[:, :, None]).sum(1)
    rope = vision.rotary_pos_emb(hidden, get_vision_position_ids(grid_thw, MERGE))
    deepstack: list[Tensor] = []
    for i, block in enumerate(vision.blocks):
        hidden = _vision_block(block, hidden, rope)
        if i in vision.deepstack_visual_indexes:
            merger = vision.deepstack_merger_list[len(deepstack)]
            deepstack.append(merger(hidden).unflatten(0, (len(patches), -1)))
    return ImageFeatures(vision.merger(hidden).unflatten(0, (len(patches), -1)), deepstack)


def _vision_block(block: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Any:
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [images, heads, patches, head_dim]
    cos, sin = rope
    mixed = F.scaled_dot_product_attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value)
    hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
    mlp = block.mlp
    return hidden + mlp.linear_fc2(F.gelu(mlp.linear_fc1(block.norm2(hidden)), approximate="tanh"))


def _text_layer(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Any:
    attention = layer.self_attn
    head_dim = attention.head_dim
    normed = _rms_norm(layer.input_layernorm, hidden)
    query = _rms_norm(attention.q_norm, attention.q_proj(normed).unflatten(-1, (-1, head_dim))).transpose(1, 2)
    key = _rms_norm(attention.k_norm, attention.k_proj(normed).unflatten(-1, (-1, head_dim))).transpose(1, 2)
    value = attention.v_proj(normed).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    cos, sin = rope[0].unsqueeze(1), rope[1].unsqueeze(1)  # [rows, 1, length, head_dim]
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    groups = attention.num_key_value_groups
    # Padding stands at the right, so the causal mask hides it from every real token.
    mixed = F.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
    )
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    mlp = layer.mlp
    normed = _rms_norm(layer.post_attention_layernorm, hidden)
    return hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return heads * cos + turned * sin
