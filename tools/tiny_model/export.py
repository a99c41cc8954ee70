"""Writes the checkpoint folder from a training state: `python -m tools.tiny_model.export --work-dir DIR`.

The folder has the files, tensor names and config fields of a published Qwen3-VL checkpoint. Its README.md is written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3VLConfig

from tools.tiny_model.pixels import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH, TEMPORAL_PATCH
from tools.tiny_model.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS
from tools.tiny_model.train import bundled_config

BUNDLED = Path(__file__).resolve().parents[2] / "epd" / "assets" / "tiny-vl"
_EMA_PREFIX = "module."
_LARGEST_CONTEXT = 4096

_FIELDS = (
    "eos_token_id",
    "pad_token_id",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "tie_word_embeddings",
)
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
)
_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "hidden_act",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "initializer_range",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny-vl"), help="what train.py wrote")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="the checkpoint folder")
    args = parser.parse_args()
    state = torch.load(args.work_dir / "state.pt", weights_only=True)
    export(state["ema"], Tokenizer.from_file(str(args.work_dir / "tokenizer.json")), args.out)
    print(f"step {state['step']}, {state['seconds']:.0f} s of training -> {args.out}")


def export(ema: dict[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes weights (`ema`: the running mean's state), tokenizer and configs to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name.removeprefix(_EMA_PREFIX): tensor.contiguous()
        for name, tensor in ema.items()
        # The head is the token table, which is stored once; the mean's counter is no weight.
        if name.startswith(_EMA_PREFIX) and not name.endswith("lm_head.weight")
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(out / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write_json(out / "config.json", hub_config(bundled_config(tokenizer)))
    _write_json(out / "generation_config.json", _generation_config(tokenizer))
    _write_json(out / "preprocessor_config.json", _preprocessor_config())


def hub_config(config: Qwen3VLConfig) -> dict[str, Any]:
    """The config as checkpoints on the hub spell it: their fields only, `rope_scaling` and `rope_theta` side by side."""
    text = _fields(config.text_config, _TEXT_FIELDS)
    rope = config.text_config.rope_parameters
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {name: rope[name] for name in ("mrope_interleaved", "mrope_section", "rope_type")}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **_fields(config, _FIELDS),
        "text_config": text,
        "vision_config": _fields(config.vision_config, _VISION_FIELDS),
    }


def _fields(config: PreTrainedConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {"model_type": config.model_type, "dtype": "float32", **{name: getattr(config, name) for name in names}}


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _LARGEST_CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "do_sample": False,
        "eos_token_id": [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
    }


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


if __name__ == "__main__":
    main()
