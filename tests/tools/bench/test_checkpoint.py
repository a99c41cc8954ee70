from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from epd.model.config import load_model_config
from epd.model.weights import load_text_weights
from tools.bench.checkpoint import experts_checkpoint, qwen3_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_checkpoint(
        tmp_path_factory.mktemp("bench") / "small",
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def test_both_sides_load_it(folder: Path) -> None:
    config = load_model_config(folder)
    assert (config.text.num_layers, config.text.head_dim, config.text.vocab_size) == (2, 16, 600)
    assert load_text_weights(config, folder).num_bytes > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    assert model.config.rope_parameters["rope_theta"] == config.text.rope_theta == 1_000_000
    assert config.eos_token_ids == (model.generation_config.eos_token_id[0],)


def test_every_token_is_some_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 600
    assert all(tokenizer.decode([token_id]) for token_id in range(600))
    assert len({tokenizer.decode([token_id]) for token_id in range(256, 597)}) == 341
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi é"}], add_generation_prompt=True, tokenize=False)
    assert (
        tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt == "<|im_start|>user\nhi é<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_is_written_once(folder: Path) -> None:
    before = (folder / "config.json").stat().st_mtime_ns
    assert qwen3_checkpoint(folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="negative dimension"):
        qwen3_checkpoint(tmp_path / "bad", vocab_size=600, num_hidden_layers=1, hidden_size=-1)
    assert list(tmp_path.iterdir()) == []


def test_one_with_experts(tmp_path: Path) -> None:
    folder = experts_checkpoint(
        tmp_path / "experts", vocab_size=600, num_hidden_layers=1, hidden_size=32, moe_intermediate_size=16
    )
    experts = load_model_config(folder).text.experts
    assert experts is not None
    assert (experts.num_experts, experts.num_chosen, experts.normalizes) == (32, 4, True)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_experts == 32
    load_text_weights(load_model_config(folder), folder)


def test_the_default_geometry_is_that_of_qwen3_0_6b() -> None:
    from tools.bench.checkpoint import _CONFIG

    config = AutoConfig.for_model(**_CONFIG)
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size + 2 * config.head_dim
    assert config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size == 596_049_920
