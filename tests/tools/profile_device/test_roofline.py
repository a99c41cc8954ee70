"""Rooflines against times worked out by hand, and the shipped profiles against what computes them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epd.emulated.cost import at
from epd.emulated.profile import SHIPPED, load_profile
from epd.model.config import load_model_config
from epd.model.preprocess import num_image_tokens
from tools.geometry import NAME, qwen3_vl_8b
from tools.profile_device.roofline import CHIPS, Chip, Shares, roofline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_vl_8b(tmp_path_factory.mktemp("geometry") / NAME)


def test_the_geometry_is_the_published_one(folder: Path) -> None:
    config = load_model_config(folder)
    assert (config.text.num_layers, config.text.num_heads, config.text.num_kv_heads, config.text.head_dim) == (36, 32, 8, 128)
    assert config.image is not None
    assert num_image_tokens((1, 68, 120), config.image.merge_size) == 2040  # 1080p


def test_times_are_bytes_or_arithmetic_at_the_assumed_share(folder: Path) -> None:
    """By hand: 7.57e9 weights are multiplied, of 2 bytes; a token of KV is 36 * 2 * 8 * 128 numbers."""
    chip = Chip("C", memory_bytes=10**11, bytes_per_s=1e12, flop_per_s=1e14)
    shares = Shares(decode_bytes=0.5, prefill_flop=0.25, attention_bytes=1.0, attention_flop=0.5, copy_bytes=0.5, step_s=0.0)
    profile = roofline(chip, load_model_config(folder), "M", shares)
    multiplied = profile.model.weight_bytes // 2 - 151_936 * 4096
    assert multiplied == pytest.approx(7.57e9, rel=1e-3)
    assert at(profile.text.rows, 1) == pytest.approx(2 * multiplied / 0.5e12)
    assert at(profile.text.rows, 4096) == pytest.approx(4096 * 2 * multiplied / 0.25e14)
    assert profile.text.context_s == pytest.approx(147_456 / 1e12)
    assert profile.text.pair_s == pytest.approx(4 * 32 * 128 * 36 / 0.5e14)
    assert profile.copies.bytes_per_s == 0.5e12


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_what_was_computed_says_so_and_what_comes_along_is_what_is_computed(chip: str, folder: Path) -> None:
    computed = roofline(CHIPS[chip], load_model_config(folder), NAME)
    assert computed.provenance == "roofline"
    assert "not measured" in computed.source
    shipped = load_profile(SHIPPED / f"{chip}-qwen3-vl-8b.json")
    assert msgspec.json.decode(msgspec.json.encode(computed)) == msgspec.json.decode(msgspec.json.encode(shipped))
