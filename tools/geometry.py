"""Folders of models without their weights: the geometry of some that are published, for emulated devices and for random weights.

What the numbers are is from the models' published configurations. The tokenizer has as many entries, and no merges: a prompt is
one token per byte.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from epd.emulated.profile import Profile
from tools.bench.checkpoint import byte_tokenizer, cache_folder, tokenizer_config, write_json

VOCAB_SIZE = 151_936
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_FIRST_SPECIAL = VOCAB_SIZE - len(_SPECIAL_TOKENS)
_IDS = {name: _FIRST_SPECIAL + index for index, name in enumerate(_SPECIAL_TOKENS)}
_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "dtype": "bfloat16",
    "image_token_id": _IDS["<|image_pad|>"],
    "video_token_id": _IDS["<|video_pad|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
    "eos_token_id": _IDS["<|im_end|>"],
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "rope_theta": 5_000_000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "initializer_range": 0.02,
    },
}
_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


# What Qwen3-VL-30B-A3B-Instruct has otherwise.
_EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_vl_moe_text",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3-vl-8b": _CONFIG,
    "qwen3-vl-30b-a3b": {
        **_CONFIG,
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": {**_CONFIG["text_config"], **_EXPERTS},
        "vision_config": {**_CONFIG["vision_config"], "model_type": "qwen3_vl_moe", "out_hidden_size": 2048},
    },
}


def name_of(geometry: str) -> str:
    """What the model is called that has no more than this geometry."""
    return f"{geometry}-geometry"


def folder_of(profile: Profile) -> Path:
    """What the profiled device runs: one of GEOMETRIES, or else the first."""
    return write_geometry(next((each for each in GEOMETRIES if name_of(each) == profile.model.name), "qwen3-vl-8b"))


def qwen3_vl_8b(folder: Path | None = None) -> Path:
    return write_geometry("qwen3-vl-8b", folder)


def write_geometry(geometry: str, folder: Path | None = None) -> Path:
    """The folder of one of GEOMETRIES, written first where it is not there yet."""
    folder = folder or cache_folder() / name_of(geometry)
    if (folder / "config.json").exists():  # the last file that is written
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_json(partial / "tokenizer.json", byte_tokenizer(VOCAB_SIZE, _SPECIAL_TOKENS))
        write_json(partial / "tokenizer_config.json", tokenizer_config(_IDS, _TEMPLATE, 262_144))
        write_json(partial / "generation_config.json", {"do_sample": False, "eos_token_id": [_IDS["<|im_end|>"]]})
        write_json(partial / "preprocessor_config.json", _PREPROCESSOR)
        (partial / "chat_template.jinja").write_text(_TEMPLATE)
        write_json(partial / "config.json", GEOMETRIES[geometry])
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder
