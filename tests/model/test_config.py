"""config.json as the hub has it and as transformers 5 writes it; what is not supported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epd.errors import BadCheckpoint, BadConfig
from epd.model.config import ExpertsConfig, load_model_config
from tests.model.reference import Model

# As published on the hub for Qwen/Qwen3-VL-2B-Instruct and Qwen/Qwen3-0.6B, shortened to what matters.
HUB_VL: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
HUB_PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
HUB_TEXT: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
# As Qwen/Qwen3-30B-A3B and Qwen/Qwen3-VL-30B-A3B-Instruct have them.
HUB_EXPERTS: dict[str, Any] = {
    **HUB_TEXT,
    **_EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
HUB_VL_EXPERTS: dict[str, Any] = {
    **HUB_VL,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {**HUB_VL["text_config"], **_EXPERTS, "norm_topk_prob": True},
}


def test_reads_models_with_experts_of_the_hub(tmp_path: Path) -> None:
    _write(tmp_path, HUB_EXPERTS)
    separate = load_model_config(tmp_path).text
    assert separate.experts == ExpertsConfig(128, 8, 768, normalizes=True, is_packed=False, layers=tuple(range(28)))
    assert separate.dense_size == 0
    _write(tmp_path, HUB_VL_EXPERTS, preprocessor_config=HUB_PREPROCESSOR)
    packed = load_model_config(tmp_path).text
    assert packed.experts is not None
    assert packed.experts.is_packed
    assert packed.rope_theta == 5e6


def test_which_layers_have_experts(tmp_path: Path) -> None:
    _write(tmp_path, {**HUB_EXPERTS, "decoder_sparse_step": 3, "mlp_only_layers": [5, 6]})
    text = load_model_config(tmp_path).text
    assert text.experts is not None
    assert text.experts.layers == (2, 8, 11, 14, 17, 20, 23, 26)
    assert text.experts_of(8) is text.experts
    assert text.experts_of(5) is None
    assert text.dense_size == text.intermediate_size


def test_what_transformers_writes_of_experts(tmp_path: Path) -> None:
    """Another name, and no width of heads."""
    fields = {**HUB_EXPERTS, "num_local_experts": 64, "hidden_size": 1280, "norm_topk_prob": False}
    del fields["num_experts"], fields["head_dim"]
    _write(tmp_path, fields)
    text = load_model_config(tmp_path).text
    assert text.experts is not None
    assert (text.experts.num_experts, text.experts.normalizes) == (64, False)
    assert text.head_dim == 80


def test_reads_a_vision_language_model_of_the_hub(tmp_path: Path) -> None:
    _write(tmp_path, HUB_VL, preprocessor_config=HUB_PREPROCESSOR, generation_config={"eos_token_id": [151645, 151643]})
    config = load_model_config(tmp_path)
    assert config.architecture == "Qwen3VLForConditionalGeneration"
    assert config.text.rope_theta == 5e6
    assert config.text.mrope_section == (24, 20, 20)
    assert config.text.tie_word_embeddings
    assert config.eos_token_ids == (151645, 151643)
    assert (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id) == (151655, 151652, 151653)
    assert config.vision is not None
    assert config.vision.deepstack_layers == (5, 11, 17)
    assert config.vision.patch_width == 3 * 2 * 16 * 16
    assert config.image is not None
    assert (config.image.min_pixels, config.image.max_pixels, config.image.patch_size) == (65536, 16777216, 16)
    assert config.kv_block_shape(16) == (28, 2, 8, 16, 128)
    assert config.embedding_width == 4 * 2048


def test_reads_a_text_model_of_the_hub(tmp_path: Path) -> None:
    _write(tmp_path, HUB_TEXT)
    config = load_model_config(tmp_path)
    assert config.vision is None
    assert config.image is None
    assert config.text.mrope_section is None
    assert config.text.rope_theta == 1e6
    assert config.eos_token_ids == (151645,)
    assert config.max_position_embeddings == 40960
    assert config.embedding_width == 1024


def test_rope_parameters_and_rope_scaling_say_the_same(tmp_path: Path) -> None:
    new = json.loads(json.dumps(HUB_VL))
    rope = new["text_config"].pop("rope_scaling")
    new["text_config"]["rope_parameters"] = {**rope, "rope_theta": new["text_config"].pop("rope_theta")}
    _write(tmp_path, new)
    _write(tmp_path / "hub", HUB_VL)
    assert load_model_config(tmp_path).text == load_model_config(tmp_path / "hub").text


def test_reads_what_transformers_writes(model_of: Callable[[str], Model]) -> None:
    config = model_of("vl-deepstack3-merge3").config
    assert config.text.attention_bias
    assert config.text.mrope_section == (4, 2, 2)
    assert config.vision is not None
    assert config.vision.merge_size == 3
    assert config.image is not None
    assert config.image.temporal_patch_size == 1


def test_a_processor_config_serves_as_preprocessor_config(tmp_path: Path) -> None:
    image_processor = {**HUB_PREPROCESSOR, "size": {"longest_edge": 4096, "shortest_edge": 1024}}
    _write(tmp_path, HUB_VL, processor_config={"image_processor": image_processor})
    image = load_model_config(tmp_path).image
    assert image is not None
    assert (image.min_pixels, image.max_pixels) == (1024, 4096)


def test_layouts_tell_geometries_apart(tmp_path: Path) -> None:
    _write(tmp_path, HUB_TEXT)
    config = load_model_config(tmp_path)
    _write(tmp_path / "other", {**HUB_TEXT, "num_key_value_heads": 4})
    other = load_model_config(tmp_path / "other")
    device = "bfloat16 sum64"
    layouts = [config.kv_layout(16), config.kv_layout(32), other.kv_layout(16), config.embedding_layout()]
    layouts += [config.kv_layout(16, device), config.embedding_layout(device)]
    assert len(set(layouts)) == len(layouts)
    assert all(0 <= layout < 1 << 63 for layout in layouts)
    assert config.kv_layout(16) == load_model_config(tmp_path).kv_layout(16)


def _changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(base))
    *sections, name = path.split(".")
    target = changed
    for section in sections:
        target = target[section]
    target[name] = value
    return changed


@pytest.mark.parametrize(
    ("base", "path", "value", "said"),
    [
        (HUB_TEXT, "architectures", ["LlamaForCausalLM"], "LlamaForCausalLM; this version runs Qwen3VL"),
        (HUB_TEXT, "architectures", [], "no architecture"),
        (HUB_TEXT, "architectures", ["Qwen3NextForCausalLM"], "Qwen3NextForCausalLM"),
        (HUB_EXPERTS, "num_experts_per_tok", 129, "cannot have 129 of 128 experts"),
        (HUB_EXPERTS, "num_experts", None, "num_experts must be an integer"),
        (HUB_EXPERTS, "moe_intermediate_size", 0, "moe_intermediate_size"),
        (HUB_EXPERTS, "mlp_only_layers", "all", "mlp_only_layers must be numbers of layers"),
        (HUB_VL_EXPERTS, "text_config.norm_topk_prob", False, "norm_topk_prob"),
        (HUB_TEXT, "quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        (HUB_TEXT, "hidden_act", "gelu", "hidden_act = 'gelu'"),
        (HUB_TEXT, "use_sliding_window", True, "use_sliding_window"),
        (HUB_TEXT, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
        (HUB_TEXT, "num_key_value_heads", 3, "16 attention heads cannot share 3"),
        (HUB_TEXT, "hidden_size", "big", "hidden_size must be an integer"),
        (HUB_TEXT, "hidden_size", True, "hidden_size must be an integer"),
        (HUB_TEXT, "num_hidden_layers", 0, "num_hidden_layers must be an integer of 1 or more"),
        (HUB_TEXT, "rms_norm_eps", -1, "rms_norm_eps must be a positive number"),
        (HUB_TEXT, "eos_token_id", "end", "eos_token_id"),
        (HUB_VL, "text_config", None, "no object 'text_config'"),
        (HUB_VL, "text_config.rope_scaling.mrope_section", [24, 20], "mrope_section"),
        (HUB_VL, "text_config.rope_scaling.mrope_interleaved", False, "mrope_interleaved"),
        (HUB_VL, "vision_config.out_hidden_size", 1024, "out_hidden_size 1024 is not the text's hidden_size 2048"),
        (HUB_VL, "vision_config.deepstack_visual_indexes", [5, 30], "layers below 24"),
        (HUB_VL, "vision_config.deepstack_visual_indexes", [5, 5], "must rise"),
        (HUB_VL, "vision_config.num_position_embeddings", 2300, "not a square"),
        (HUB_VL, "vision_config.num_heads", 5, "5 heads"),
        (HUB_VL, "vision_config.in_channels", 4, "in_channels"),
        (HUB_VL, "vision_config.hidden_act", "relu", "hidden_act"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base: dict[str, Any], path: str, value: Any, said: str, tmp_path: Path) -> None:
    _write(tmp_path, _changed(base, path, value))
    with pytest.raises(BadConfig, match=said):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("patch_size", 14, "patch_size 14 differs from the vision tower's 16"),
        ("do_resize", False, "do_resize = False"),
        ("image_mean", [0.5], "image_mean must be three numbers"),
        ("size", {"shortest_edge": 0}, "shortest_edge"),
    ],
)
def test_a_preprocessor_that_does_not_fit_is_refused(name: str, value: Any, said: str, tmp_path: Path) -> None:
    _write(tmp_path, HUB_VL, preprocessor_config={**HUB_PREPROCESSOR, name: value})
    with pytest.raises(BadConfig, match=said):
        load_model_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_file_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        load_model_config(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="does not exist"):
        load_model_config(tmp_path)


def _write(folder: Path, config: dict[str, Any], **more: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, **more}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
