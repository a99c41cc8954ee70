"""A device whose costs are known is measured to have them: an emulated one, on a clock that only its work moves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from epd.cluster import emulated_stack
from epd.cluster.build import load
from epd.config import ServeConfig, parse
from epd.emulated.cost import at
from epd.emulated.device import EmulatedDevice
from epd.model.config import load_model_config
from epd.options import BUNDLED_MODEL
from tests.emulated.profiles import PROFILE
from tests.emulated.test_device import StepClock
from tools.profile_device import measure


def test_a_known_device_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "known.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    clock = StepClock()
    monkeypatch.setattr(emulated_stack, "EmulatedDevice", partial(EmulatedDevice, clock=clock))
    monkeypatch.setattr("tools.profile_device.measure.time", SimpleNamespace(perf_counter=clock.now))
    config = parse(["serve", "--roles", "encode,prefill,decode", "--device", f"emulated:{path}", "--max-running", "64"])
    assert isinstance(config, ServeConfig)
    parts = load(config, BUNDLED_MODEL, load_model_config(BUNDLED_MODEL), lambda text: None)
    try:
        fit = measure.measure(parts, device="D", source="a test")
    finally:
        parts.close()
    found = fit.profile
    assert found.provenance == "measured"
    assert found.text.pair_s == pytest.approx(PROFILE.text.pair_s)
    assert found.text.context_s == pytest.approx(PROFILE.text.context_s)
    for rows in (1, 8, 64, 512, 2048):
        assert at(found.text.rows, rows) == pytest.approx(at(PROFILE.text.rows, rows)), rows
    assert at(found.vision.patches, 64) == pytest.approx(at(PROFILE.vision.patches, 64))
    assert fit.checks
    assert fit.worst < 0.05  # the curve has a knee between two of the points that are measured
