"""By hand, with the numbers of Qwen3-VL-8B-Instruct's configuration and with ones small enough to count on paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from epd.model.config import ModelConfig, load_model_config
from tools.geometry import qwen3_vl_8b
from tools.gpu_check.figures.counts import (
    chunk_attention_flop,
    decode_weight_bytes,
    kv_token_bytes,
    layer_kv_bytes,
    prefill_flop,
    vision_flop,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_model_config(qwen3_vl_8b(tmp_path_factory.mktemp("model") / "8b"))


def test_weights_that_a_step_reads(config: ModelConfig) -> None:
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    assert decode_weight_bytes(config, 2) == 2 * (36 * layer + 4096 + 151_936 * 4096) == 15_136_811_008


def test_a_shared_table_is_read_as_the_output_layer(config: ModelConfig) -> None:
    tied = replace(config, text=replace(config.text, tie_word_embeddings=True))
    assert decode_weight_bytes(tied, 2) == decode_weight_bytes(config, 2)


def test_kv_of_a_token(config: ModelConfig) -> None:
    assert layer_kv_bytes(config.text, 2) == 2 * 8 * 128 * 2
    assert kv_token_bytes(config.text, 2) == 147_456


def test_pairs_of_a_chunk(config: ModelConfig) -> None:
    """Three queries after five tokens see 6, 7 and 8 keys; a pair is 2 * 128 for the score and as much for the sum, by head."""
    assert chunk_attention_flop(config.text, 3, 8) == 4 * (6 + 7 + 8) * 32 * 128


def test_a_prompt_in_small(config: ModelConfig) -> None:
    text = replace(
        config.text, num_layers=2, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=8, vocab_size=10
    )
    keys_values, others = 2 * 4 * (2 + 2), 2 * (4 * 4 + 4 * 4 + 3 * 4 * 8)
    first = 3 * (keys_values + others) + 4 * (1 + 2 + 3) * 4
    last = 3 * keys_values + others + 4 * 3 * 4
    assert prefill_flop(text, 3) == first + last + 2 * 4 * 10


def test_a_prompt_of_8k_tokens(config: ModelConfig) -> None:
    """Two operations for each weight and token but for most of the last layer, and half a square of pairs."""
    weights = 35 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12_288)
    assert prefill_flop(config.text, 8192) == pytest.approx(8192 * 2 * weights + 35 * 4 * 8192**2 / 2 * 4096, rel=2e-3)


def test_an_image(config: ModelConfig) -> None:
    """1920 x 1080 becomes 120 x 68 patches."""
    vision, patches = config.vision, 120 * 68
    assert vision is not None
    linear = 2 * (1152 * 3 * 1152 + 1152 * 1152 + 2 * 1152 * 4304) * 27
    mergers = 4 * 2 * (4608 * 4608 + 4608 * 4096) / 4
    embedding = 2 * (3 * 2 * 16 * 16) * 1152
    assert vision_flop(vision, patches) == patches * (embedding + linear + mergers + 27 * 4 * patches * 1152)


def test_the_bundled_model_can_be_counted(config: ModelConfig) -> None:
    bundled = load_model_config(Path(__file__).parents[3] / "epd/assets/tiny-vl")
    assert bundled.text.tie_word_embeddings
    assert decode_weight_bytes(bundled, 4) == 4 * sum(
        (
            512 * 128 + 128,
            4 * (128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 384 + 2 * 128 + 2 * 32),
        )
    )
