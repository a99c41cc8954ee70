from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.cluster.sizes import decide
from epd.config import BUNDLED_MODEL, EngineConfig, ServeConfig, parse
from epd.errors import BadConfig
from epd.model.config import load_model_config

MODEL = load_model_config(BUNDLED_MODEL)
GIB = 2**30


def _engine(*words: str) -> EngineConfig:
    config = parse(["serve", "--token-file", __file__, *words])
    assert isinstance(config, ServeConfig)
    return config.engine


def test_by_default_a_pool_holds_several_of_the_longest_requests() -> None:
    sizes = decide(MODEL, _engine(), free_bytes=16 * GIB)
    assert sizes.max_model_len == MODEL.max_position_embeddings
    assert sizes.num_kv_blocks * 16 >= 2 * sizes.max_model_len
    assert sizes.kv_block_bytes == 4 * MODEL.text.num_layers * 2 * MODEL.text.num_kv_heads * 16 * MODEL.text.head_dim


@given(st.integers(2**24, 2**36), st.sampled_from([1, 8, 16, 64]))
def test_what_is_not_asked_for_fits_the_free_memory(free_bytes: int, block_size: int) -> None:
    sizes = decide(MODEL, _engine("--block-size", str(block_size)), free_bytes=free_bytes)
    assert sizes.kv_bytes <= free_bytes / 8
    assert sizes.embedding_bytes <= free_bytes / 16
    assert 0 < sizes.max_model_len <= sizes.num_kv_blocks * block_size


def test_a_wish_is_kept_or_refused_with_the_numbers() -> None:
    sizes = decide(MODEL, _engine("--kv-mib", "1", "--embedding-mib", "2"), free_bytes=GIB)
    assert sizes.kv_bytes <= 2**20 < sizes.kv_bytes + sizes.kv_block_bytes
    assert sizes.embedding_bytes <= 2**21 < sizes.embedding_bytes + sizes.embedding_block_bytes
    assert decide(MODEL, _engine("--max-model-len", "100"), free_bytes=GIB).max_model_len == 100
    for words, reason in (
        (["--kv-mib", "0.001"], "does not hold one block"),
        (["--kv-mib", "0.1", "--max-model-len", "4000"], "the pool has 0 MiB"),
        (["--max-model-len", "1000000"], "was made for"),
        (["--embedding-mib", "0.001"], "--embedding-mib"),
    ):
        with pytest.raises(BadConfig, match=reason):
            decide(MODEL, _engine(*words), free_bytes=GIB)


def test_hardly_any_memory_is_said_so() -> None:
    with pytest.raises(BadConfig, match="MiB of memory are free"):
        decide(MODEL, _engine(), free_bytes=2**16)
