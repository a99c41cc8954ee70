"""A folder is taken as it is; what is neither folder nor hub id, or cannot be had, is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from epd.errors import BadConfig
from epd.model.loader import resolve_model


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["/no/such/folder", "one", "a/b/c", "", "../x", "owner/"])
def test_what_is_neither_is_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="neither a folder nor a hub id"):
        resolve_model(name)


def test_only_what_is_wanted_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert resolve_model("Qwen/Qwen3-0.6B", weights=False) == tmp_path
    assert [("*.safetensors" in patterns) for _, patterns in asked] == [True, False]
    assert asked[0][0] == "Qwen/Qwen3-0.6B"


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(BadConfig, match="no route to host"):
        resolve_model("Qwen/Qwen3-0.6B")
