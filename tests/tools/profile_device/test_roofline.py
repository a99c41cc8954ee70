"""Rooflines against times worked out by hand, and the shipped profiles against what computes them."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from epd.emulated.cost import at
from epd.emulated.profile import SHIPPED, load_profile
from epd.model.config import load_model_config
from epd.model.preprocess import num_image_tokens
from tools.geometry import GEOMETRIES, name_of, write_geometry
from tools.profile_device.roofline import CHIPS, Chip, Shares, roofline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geometry("qwen3-vl-8b", tmp_path_factory.mktemp("geometry") / "8b")


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geometry("qwen3-vl-30b-a3b", tmp_path_factory.mktemp("geometry") / "30b")


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


def test_a_step_reads_the_experts_that_its_rows_choose(with_experts: Path) -> None:
    """By hand: of 30.5e9 weights, 29.0e9 are experts'; 3.0e9 take part in a token."""
    config = load_model_config(with_experts)
    chip, shares = Chip("C", 10**11, bytes_per_s=1e12, flop_per_s=1e15), Shares(decode_bytes=1.0, prefill_flop=1.0, step_s=0.0)
    profile = roofline(chip, config, "M", shares)
    assert profile.model.weight_bytes / 2 == pytest.approx(30.5e9, rel=5e-3)
    every = 48 * 128 * 3 * 768 * 2048
    others = profile.model.weight_bytes / 2 - every - 151_936 * 2048
    assert every == pytest.approx(29.0e9, rel=1e-3)
    active = others + every / 16
    assert active == pytest.approx(3.03e9, rel=1e-2)
    rows = profile.text.rows
    assert at(rows, 1) == pytest.approx(2 * active / 1e12)
    assert at(rows, 2) == pytest.approx(2 * (others + every * (1 - (15 / 16) ** 2)) / 1e12)
    assert at(rows, 256) == pytest.approx(2 * (others + every) / 1e12, rel=1e-3)
    assert at(rows, 65_536) == pytest.approx(65_536 * 2 * active / 1e15, rel=2e-3)
    assert all(later >= earlier for (_, earlier), (_, later) in itertools.pairwise(rows))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_what_was_computed_says_so_and_what_comes_along_is_what_is_computed(chip: str, geometry: str, tmp_path: Path) -> None:
    computed = roofline(CHIPS[chip], load_model_config(write_geometry(geometry, tmp_path / "model")), name_of(geometry))
    assert computed.provenance == "roofline"
    assert "not measured" in computed.source
    shipped = load_profile(SHIPPED / f"{chip}-{geometry}.json")
    assert msgspec.json.decode(msgspec.json.encode(computed)) == msgspec.json.decode(msgspec.json.encode(shipped))
