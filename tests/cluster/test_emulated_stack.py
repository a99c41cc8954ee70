from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epd.cluster.emulated_stack import EmulatedStack
from epd.config import ServeConfig, parse
from epd.emulated.profile import SHIPPED, load_profile, slowed
from epd.errors import BadConfig
from epd.model.config import load_model_config
from epd.options import BUNDLED_MODEL
from tests.emulated.profiles import PROFILE


def _stack(device: str, *words: str) -> EmulatedStack:
    config = parse(["serve", "--device", device, *words])
    assert isinstance(config, ServeConfig)
    return EmulatedStack(config, load_model_config(BUNDLED_MODEL))


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "d.json"
    file.write_bytes(msgspec.json.encode(PROFILE))
    return str(file)


def test_pools_have_as_many_blocks_as_the_device_would_hold(path: str) -> None:
    stack = _stack(f"emulated:{path}", "--memory-fraction", "0.5", "--block-size", "8")
    sizes = stack.decide(["encode", "prefill", "decode"])
    left = (1 << 29) - (1 << 20) - (1 << 18)
    assert sizes.num_kv_blocks == int(left * 15 / 16) // 8000
    assert sizes.kv_block_bytes == 64  # one word a token
    assert sizes.num_embedding_blocks == int(left / 16) // 6400
    stack.close()


def test_a_model_that_does_not_fit_is_refused_with_its_size(path: str) -> None:
    stack = _stack(f"emulated:{path}", "--memory-fraction", "0.0001")
    with pytest.raises(BadConfig, match=r"M needs 0\.0 GB of weights, which D1 does not hold"):
        stack.decide(["prefill"])
    stack.close()


def test_a_slow_device_takes_longer_for_everything(path: str) -> None:
    stack = _stack(f"emulated:{path}?slow=2&sharing=prefill-first")
    assert stack.device.profile == slowed(PROFILE, 2)
    assert stack.device.profile.text.rows[0] == (1.0, 0.020)
    assert stack.device.profile.copies.bytes_per_s == 5e11
    stack.close()


@pytest.mark.parametrize("query", ["sharing=fair", "slow=fast", "slow=0", "speed=1"])
def test_options_that_are_none_are_refused(path: str, query: str) -> None:
    with pytest.raises(BadConfig, match="sharing"):
        _stack(f"emulated:{path}?{query}")


@pytest.mark.parametrize("name", [file.stem for file in SHIPPED.glob("*.json")])
def test_profiles_that_come_along_can_be_named_and_say_where_they_are_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.source
    if "NVIDIA" in profile.device and profile.provenance == "roofline":
        assert "not measured" in profile.source
