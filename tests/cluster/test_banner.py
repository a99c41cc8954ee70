"""What is printed to be pasted is what the server takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from epd.cluster.banner import banner
from epd.config import ServeConfig, parse
from epd.options import BUNDLED_MODEL
from tests.support.cluster import SMALL, WAIT_S, Process

URL = "http://127.0.0.1:8000"


def printed(*words: str, takes_images: bool = True) -> str:
    config = parse(["serve", *words])
    assert isinstance(config, ServeConfig)
    return banner([URL], config, takes_images=takes_images)


def pasted(text: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """URL, headers and body of the curl command, as a shell reads them."""
    (command,) = re.findall(r"^curl .*?\}'$", text, re.DOTALL | re.MULTILINE)
    _, _, url, *words = shlex.split(command)
    options = list(zip(words[::2], words[1::2], strict=True))
    headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
    (body,) = (json.loads(value) for name, value in options if name == "-d")
    return url, headers, body


def names(text: str) -> set[str]:
    """Of the model, in both commands."""
    return {pasted(text)[2]["model"], *re.findall(r'create\(model="(.*?)"', text)}


def test_a_hub_id_is_named_whole() -> None:
    assert names(printed("--model", "Qwen/Qwen3-VL-2B-Instruct")) == {"Qwen/Qwen3-VL-2B-Instruct"}


def test_a_folder_is_named_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in (str(folder), f"{folder}/", ".", "~/some-model"):
        assert names(printed("--model", model)) == {"some-model"}


def test_what_the_model_is_told_to_be_called() -> None:
    assert names(printed("--model", "owner/model", "--served-model-name", "mine")) == {"mine"}


def test_a_key_goes_along() -> None:
    url, headers, _ = pasted(printed("--api-key", "a key"))
    assert url == f"{URL}/v1/chat/completions"
    assert headers["Authorization"] == "Bearer a key"


@pytest.mark.parametrize("takes_images", [True, False])
def test_an_image_is_sent_to_who_takes_it(takes_images: bool) -> None:
    assert ("image_url" in printed(takes_images=takes_images)) == takes_images


# --- the server itself ----------------------------------------------------------------------------------------------


def text_only(folder: Path) -> Path:
    """A model without a vision tower, as far as it can be served with random weights."""
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    text = {**config["text_config"], "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "eos_token_id": 507}
    text.pop("rope_scaling")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(text))
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    return folder


@pytest.mark.parametrize(("command", "sees"), [("serve", True), ("cluster", True), ("cluster", False)])
def test_what_is_printed_is_answered(command: str, sees: bool, tmp_path: Path) -> None:
    """By a model that is not given by its plain name."""
    folder = BUNDLED_MODEL if sees else text_only(tmp_path / "text-only")
    words = ("--model", f"{folder}/.", "--load-format", "dummy", "--port", "0", *SMALL)
    with closing(Process(command, *words, *(("--encode", "1") if command == "cluster" else ()))) as process:
        process.line(r"print\(chunk")
        url, headers, body = pasted("\n".join(process.lines))
        assert ("image_url" in str(body)) == sees
        data = json.dumps({**body, "stream": False, "max_tokens": 3}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=WAIT_S) as answer:
            said = json.load(answer)
        assert said["model"] == folder.name
        assert said["usage"]["completion_tokens"] > 0
