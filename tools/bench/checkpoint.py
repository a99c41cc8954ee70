"""A checkpoint with the geometry of Qwen3-0.6B and random weights, written once, so that all servers compared load the same.

Speed does not depend on what the weights are, only on their shapes. The tokenizer has Qwen3's number of entries and no merges: a
prompt is one token per byte, and whatever token a random model picks decodes to some text, so that every token shows in a stream.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCAB_SIZE = 151_936
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "use_cache": True,
}
# A token takes part in an eighth of the experts' weights, as in the models that are published.
_EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def cache_folder() -> Path:
    """Where what is built once for measuring is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epd-bench"


def qwen3_checkpoint(folder: Path | None = None, **changed: Any) -> Path:
    """The checkpoint's folder, written first where it is not there yet (2.4 GB, half a minute).

    `changed` replaces entries of config.json, for a smaller one in tests; give it a folder of its own.
    """
    return _write_once(folder or cache_folder() / "qwen3-0.6b-random-f32", _CONFIG | changed)


def experts_checkpoint(folder: Path | None = None, **changed: Any) -> Path:
    """A small Qwen3 with experts; otherwise as `qwen3_checkpoint` (2.0 GB)."""
    return _write_once(folder or cache_folder() / "qwen3-experts-random-f32", _CONFIG | _EXPERTS | changed)


def _write_once(folder: Path, config: dict[str, Any]) -> Path:
    if (folder / "config.json").exists():  # the last file that is written
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write(partial, config)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer(config["vocab_size"])
    ids = {name: int(tokenizer["added_tokens"][index]["id"]) for index, name in enumerate(_SPECIAL_TOKENS)}
    config |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder, max_shard_size="1GB")
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config(ids, _CHAT_TEMPLATE, config["max_position_embeddings"]))
    write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": [ids["<|im_end|>"]]})
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    write_json(folder / "config.json", config)  # as the hub spells it, which transformers reads as well


def byte_tokenizer(vocab_size: int, special_tokens: Sequence[str] = _SPECIAL_TOKENS) -> dict[str, Any]:
    """A byte-level BPE without merges: 256 bytes, then words that only decode, then the special tokens."""
    vocab = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    while len(vocab) < vocab_size - len(special_tokens):
        vocab[f"\u0120w{len(vocab)}"] = len(vocab)  # \u0120 is how byte-level BPE writes a leading blank
    added = [
        {
            "id": len(vocab) + index,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, name in enumerate(special_tokens)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def tokenizer_config(ids: dict[str, int], template: str, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": template,
        "added_tokens_decoder": {str(index): {"content": name, "special": True} for name, index in ids.items()},
    }


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=None if path.name == "tokenizer.json" else 2) + "\n")
