"""The bundled model with experts in place of its dense layers: it still sees and counts, and routes tokens while it does."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from epd.options import BUNDLED_MODEL

NUM_EXPERTS, NUM_CHOSEN = 6, 2
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def write_model(folder: Path) -> Path:
    """Each expert is the dense layer with its numbers moved a little, and routers are random: what two of six say is about the
    same, but never quite. (Sparse upcycling, Komatsuzaki et al. 2023.)"""
    dense = Qwen3VLForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    options = dense.config.to_dict()
    text = options["text_config"]
    text |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": NUM_CHOSEN, "moe_intermediate_size": text["intermediate_size"]}
    for each in (options, text, options["vision_config"]):
        each.pop("model_type")
        each.pop("architectures", None)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**options))
    torch.manual_seed(1)
    tensors = dict(dense.state_dict())
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}."
        gate, up, down = (tensors.pop(prefix + name) for name in _MLP)
        tensors[f"{prefix}mlp.gate.weight"] = torch.randn(NUM_EXPERTS, text["hidden_size"])
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = _moved(torch.cat([gate, up]))
        tensors[f"{prefix}mlp.experts.down_proj"] = _moved(down)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BUNDLED_MODEL) / name, folder)
    shutil.copy(Path(BUNDLED_MODEL) / "generation_config.json", folder)
    return folder


def _moved(weight: torch.Tensor) -> torch.Tensor:
    return weight + 0.1 * weight.std() * torch.randn(NUM_EXPERTS, *weight.shape)
