from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epd.emulated.profile import load_profile
from epd.errors import BadConfig
from tests.emulated.profiles import PROFILE


def _write(folder: Path, **changes: object) -> Path:
    path = folder / "profile.json"
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(PROFILE) | changes))
    return path


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    assert load_profile(_write(tmp_path)) == PROFILE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"provenance": "guessed"}, "no device profile"),
        ({"colour": "red"}, "no device profile"),
        ({"memory_bytes": 0}, "more than nothing"),
        ({"model": {**msgspec.to_builtins(PROFILE.model), "active_share": 1.5}}, "active_share is a share of the weights"),
        ({"text": {"rows": [[1, 1.0]], "pair_s": 0.0, "context_s": 0.0}}, "text.rows needs at least two"),
        ({"text": {"rows": [[2, 1.0], [2, 1.0]], "pair_s": 0.0, "context_s": 0.0}}, "rising"),
        ({"text": {"rows": [[1, 2.0], [2, 1.0]], "pair_s": 0.0, "context_s": 0.0}}, "fall"),
        ({"text": {"rows": [[1, 1.0], [2, 1.0]], "pair_s": -1.0, "context_s": 0.0}}, "negative"),
        ({"copies": {"latency_s": 0.0, "bytes_per_s": 0.0}}, "bandwidth"),
    ],
)
def test_what_is_no_profile_is_refused_with_a_reason(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BadConfig, match=reason):
        load_profile(_write(tmp_path, **changes))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot read the device profile"):
        load_profile(tmp_path / "absent.json")
