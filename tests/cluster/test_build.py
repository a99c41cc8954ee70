"""What stages are given that depends on device and model."""

from __future__ import annotations

import pytest

from epd.cluster.build import budget_beside_decode
from epd.config import ServeConfig, parse
from epd.model.config import load_model_config
from tools.geometry import write_geometry


@pytest.mark.parametrize(
    ("words", "geometry", "tokens"),
    [
        (["--device", "cuda"], "qwen3-vl-8b", 512),
        (["--device", "cuda"], "qwen3-vl-30b-a3b", 2048),
        (["--device", "cuda", "--budget-beside-decode", "700"], "qwen3-vl-30b-a3b", 700),
        (["--device", "cpu"], "qwen3-vl-30b-a3b", 2048),
    ],
)
def test_a_step_beside_decode_suits_device_and_model_unless_said_otherwise(words: list[str], geometry: str, tokens: int) -> None:
    config = parse(["serve", *words])
    assert isinstance(config, ServeConfig)
    assert budget_beside_decode(config, load_model_config(write_geometry(geometry))) == tokens
