from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.cluster.budget import BudgetItem, weight_items, working_items
from epd.cluster.sizes import DeviceMemory, Sizes, budget_lines, decide
from epd.config import EngineConfig, ServeConfig, parse
from epd.errors import BadConfig
from epd.model.config import ImageConfig, ModelConfig, TextConfig, VisionConfig, load_model_config
from epd.options import BUNDLED_MODEL

MODEL = load_model_config(BUNDLED_MODEL)
GIB = 2**30
ROLES = ("gateway", "encode", "prefill", "decode")
# As Qwen3-VL-8B-Instruct is published.
EIGHT_B = ModelConfig(
    architecture="Qwen3VLForConditionalGeneration",
    text=TextConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 5e6, (24, 20, 20), False, False, 262144),
    vision=VisionConfig(27, 1152, 4304, 16, 3, 16, 2, 2, 4096, 2304, (8, 16, 24)),
    image=ImageConfig(16, 2, 2, 65536, 16777216, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3, 1 / 255),
    eos_token_ids=(151645,),
)
KV_TOKEN_BYTES = 36 * 2 * 8 * 128 * 2


def _engine(*words: str) -> EngineConfig:
    config = parse(["serve", "--token-file", __file__, *words])
    assert isinstance(config, ServeConfig)
    return config.engine


def _on_host(engine: EngineConfig, free_bytes: int) -> Sizes:
    return decide(MODEL, engine, memory=DeviceMemory.of_host(free_bytes), roles=ROLES)


def _on_device(
    *words: str,
    total: float,
    free: float = 0.0,
    fraction: float = 0.9,
    roles: tuple[str, ...] = ROLES,
    model: ModelConfig = EIGHT_B,
) -> Sizes:
    """`total` and `free` in GiB; free: all of it."""
    memory = DeviceMemory(int(total * GIB), int((free or total) * GIB), fraction, dtype_bytes=2, is_host=False)
    return decide(model, _engine(*words), memory=memory, roles=roles)


def _item(items: tuple[BudgetItem, ...] | list[BudgetItem], name: str) -> int:
    return sum(item.num_bytes for item in items if item.name == name)


# --- a host ---------------------------------------------------------------------------------------------------------


def test_by_default_a_pool_holds_several_of_the_longest_requests() -> None:
    sizes = _on_host(_engine(), 16 * GIB)
    assert sizes.max_model_len == MODEL.max_position_embeddings
    assert sizes.num_kv_blocks * 16 >= 2 * sizes.max_model_len
    assert sizes.kv_block_bytes == 4 * MODEL.text.num_layers * 2 * MODEL.text.num_kv_heads * 16 * MODEL.text.head_dim
    assert budget_lines(sizes) == []


@given(st.integers(2**24, 2**36), st.sampled_from([1, 8, 16, 64]))
def test_what_is_not_asked_for_fits_the_free_memory(free_bytes: int, block_size: int) -> None:
    sizes = _on_host(_engine("--block-size", str(block_size)), free_bytes)
    assert sizes.kv_bytes <= free_bytes / 8
    assert sizes.embedding_bytes <= free_bytes / 16
    assert 0 < sizes.max_model_len <= sizes.num_kv_blocks * block_size


def test_a_wish_is_kept_or_refused_with_the_numbers() -> None:
    sizes = _on_host(_engine("--kv-mib", "1", "--embedding-mib", "2"), GIB)
    assert sizes.kv_bytes <= 2**20 < sizes.kv_bytes + sizes.kv_block_bytes
    assert sizes.embedding_bytes <= 2**21 < sizes.embedding_bytes + sizes.embedding_block_bytes
    assert _on_host(_engine("--max-model-len", "100"), GIB).max_model_len == 100
    for words, reason in (
        (["--kv-mib", "0.001"], "does not hold one block"),
        (["--kv-mib", "0.1", "--max-model-len", "4000"], "the pool has 0 MiB"),
        (["--max-model-len", "1000000"], "was made for"),
        (["--embedding-mib", "0.001"], "--embedding-mib"),
    ):
        with pytest.raises(BadConfig, match=reason):
            _on_host(_engine(*words), GIB)


def test_hardly_any_memory_is_said_so() -> None:
    with pytest.raises(BadConfig, match="MiB of memory are free"):
        _on_host(_engine(), 2**16)


# --- a device -------------------------------------------------------------------------------------------------------


def test_a_large_device_gives_the_kv_all_that_is_left() -> None:
    sizes = _on_device(total=139.8)
    assert sizes.max_model_len == 262144
    assert sizes.kv_block_bytes == 16 * KV_TOKEN_BYTES
    assert 95 * GIB < sizes.kv_bytes < 108 * GIB
    assert sizes.num_embedding_blocks * 64 == 2 * 16384  # the largest image, twice
    assert _item(sizes.budget, "unused") < sizes.kv_block_bytes


def test_weights_are_counted_as_published() -> None:
    items = weight_items(EIGHT_B, ROLES, 2)
    assert {item.name: item.num_bytes // 2 for item in items} == {
        "weights of the language model": 8_190_735_360,
        "weights of the vision tower": 576_388_336,
    }
    assert [item.name for item in weight_items(EIGHT_B, ("encode",), 2)] == ["weights of the vision tower"]
    assert [item.name for item in weight_items(EIGHT_B, ("decode",), 2)] == ["weights of the language model"]
    assert weight_items(EIGHT_B, ("gateway",), 2) == []


@pytest.mark.parametrize(
    ("roles", "names"),
    [
        (("encode",), {"encode steps", "libraries"}),
        (("prefill",), {"prefill steps", "fetched embeddings", "libraries"}),
        (("decode",), {"decode steps", "libraries"}),
        (ROLES, {"encode steps", "prefill steps", "fetched embeddings", "decode steps", "libraries"}),
    ],
)
def test_working_memory_is_that_of_the_roles(roles: tuple[str, ...], names: set[str]) -> None:
    assert {item.name for item in working_items(EIGHT_B, _engine(), roles, 2)} == names


def test_working_memory_grows_with_what_a_step_may_hold() -> None:
    engine = _engine()
    for name, larger in (
        ("encode steps", replace(engine, max_patches=2 * 65536)),
        ("prefill steps", replace(engine, token_budget=2 * engine.token_budget)),
        ("decode steps", replace(engine, max_running=2 * engine.max_running)),
    ):
        before, after = (_item(working_items(EIGHT_B, each, ROLES, 2), name) for each in (engine, larger))
        assert before < after
        assert _item(working_items(EIGHT_B, engine, ROLES, 4), name) > before  # and with the numbers' size
    # The largest image is encoded alone, whatever a step's limit is.
    assert _item(working_items(EIGHT_B, replace(engine, max_patches=1), ROLES, 2), "encode steps") >= 65536 * 2 * 1152 * 8


def test_a_stage_of_its_own_takes_only_its_own() -> None:
    encode = _on_device(total=24, roles=("encode",))
    assert encode.num_kv_blocks == 0
    assert encode.num_embedding_blocks > 0
    assert encode.max_model_len == 262144  # it limits nobody
    decode = _on_device(total=24, roles=("decode",))
    assert decode.num_embedding_blocks == 0
    assert _item(decode.budget, "KV gathered for the longest prompt") == 0
    assert decode.kv_bytes > _on_device(total=24, roles=("prefill",)).kv_bytes


def test_a_small_device_shortens_the_longest_request() -> None:
    sizes = _on_device(total=24, roles=("prefill", "decode"))
    assert sizes.max_model_len == sizes.num_kv_blocks * 16 < 262144
    assert _item(sizes.budget, "KV gathered for the longest prompt") == sizes.kv_bytes // 36


@pytest.mark.parametrize(
    ("words", "total", "free", "said"),
    [
        ((), 16.0, 16.0, r"weights of the language model 15\.26 GiB \+ weights of .* > 14\.40 GiB allowed, 0\.9 of 16\.00 GiB"),
        ((), 80.0, 12.0, r"> 12\.00 GiB that are free of 80\.00 GiB: let go"),
        (("--max-model-len", "262144"), 40.0, 40.0, r"KV of 262144 tokens 37\.00 GiB > 36\.00 GiB allowed"),
        (("--kv-mib", "40000"), 40.0, 40.0, r"KV of 284432 tokens .* > 36\.00 GiB allowed"),
        (("--kv-mib", "100", "--max-model-len", "4000"), 80.0, 80.0, r"--max-model-len 4000 takes"),
        (("--kv-mib", "0.5"), 80.0, 80.0, "does not hold one block"),
        (("--max-model-len", "262145"), 80.0, 80.0, "made for 262144"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(words: tuple[str, ...], total: float, free: float, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        _on_device(*words, total=total, free=free)


def test_an_encoder_that_does_not_fit_is_refused_too() -> None:
    with pytest.raises(BadConfig, match=r"encode steps .* > 2\.70 GiB"):
        _on_device(total=3, roles=("encode",))


def test_the_budget_adds_up_in_print() -> None:
    lines = budget_lines(_on_device(total=80))
    amounts = [float(line.split()[0]) for line in lines]
    assert amounts[-1] == 72.0
    assert sum(amounts[:-1]) == pytest.approx(72.0, abs=0.01 * len(lines))
    assert any("KV pool (" in line and "tokens" in line for line in lines)


@given(
    total=st.floats(0.5, 200),
    used=st.floats(0, 1),
    fraction=st.floats(0.05, 1.0),
    roles=st.sets(st.sampled_from(["encode", "prefill", "decode"]), min_size=1),
    dtype_bytes=st.sampled_from([2, 4]),
    block_size=st.sampled_from([1, 16, 64]),
    model=st.sampled_from([MODEL, EIGHT_B]),
    max_model_len=st.sampled_from([0, 100, 2000]),
)
def test_a_budget_is_kept_whatever_there_is(
    total: float,
    used: float,
    fraction: float,
    roles: set[str],
    dtype_bytes: int,
    block_size: int,
    model: ModelConfig,
    max_model_len: int,
) -> None:
    memory = DeviceMemory(int(total * GIB), int(total * (1 - used) * GIB), fraction, dtype_bytes, is_host=False)
    engine = _engine("--block-size", str(block_size), "--max-model-len", str(max_model_len))
    try:
        sizes = decide(model, engine, memory=memory, roles=roles)
    except BadConfig:
        return
    assert sum(item.num_bytes for item in sizes.budget) == memory.allowed_bytes
    assert min(item.num_bytes for item in sizes.budget) >= 0
    assert _item(sizes.budget, "KV pool") == sizes.kv_bytes
    assert _item(sizes.budget, "embedding pool") == sizes.embedding_bytes
    assert (sizes.num_embedding_blocks > 0) == ("encode" in roles)
    assert sizes.max_model_len <= model.max_position_embeddings
    if roles != {"encode"}:
        assert 0 < sizes.max_model_len <= sizes.num_kv_blocks * block_size
        assert sizes.max_model_len >= (max_model_len or min(engine.token_budget, model.max_position_embeddings))
        assert _item(sizes.budget, "unused") <= 2 * sizes.kv_block_bytes  # nothing is left lying about
