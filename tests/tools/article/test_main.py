"""The whole experiment, small: three devices, one workload, real processes. What it measured is not judged, only that it did."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from epd.emulated.profile import TextCosts, VisionCosts
from tests.emulated.profiles import PROFILE
from tools.article.__main__ import main


def test_a_small_experiment_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "device.json"
    language = TextCosts(rows=((1, 0.002), (1000, 0.020)), pair_s=0.0, context_s=0.0)
    vision = VisionCosts(patches=((0, 0.0), (10_000, 0.050)), pair_s=0.0, preprocess=((0, 0.0), (10_000, 0.010)))
    quick = msgspec.structs.replace(PROFILE, memory_bytes=8 << 30, text=language, vision=vision)
    profile.write_bytes(msgspec.json.encode(quick))
    out = tmp_path / "results" / "run.json"
    words = ["--profile", str(profile), "--devices", "3", "--ratios", "1:1:1", "--workloads", "1 image", "--users", "4"]
    words += ["--output-tokens", "8", "--budget", "1", "--least-cell-s", "2", "--slow", "1", "--no-progress"]
    status = main([*words, "--out", str(out)])
    kept = json.loads(out.read_text())
    assert status in (0, 1)  # 1: this host was too slow, and it said so
    assert status == 0 or not kept["is_trusted"]
    cells = {(each["workload"], each["topology"]): each for each in kept["cells"]}
    assert {name for name, _ in cells} == {"1 image"}
    assert {name for _, name in cells} == {"colocated, prefill first", "colocated, chunked", "epd E:P:D 1:1:1", "epd EPD 3"} | {
        name for _, name in cells if name.startswith("epd EP:D")
    }
    assert sum(each["is_auto"] for each in kept["cells"]) == 1
    for each in kept["cells"]:
        assert each["failures"] == 0
        assert each["requests_per_s"] > 0
        assert each["ttft_mean_s"] > 0
        assert 0 < each["utilisation"] < 1.5
    text = out.with_suffix(".md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "roofline, not measured" in text
    assert out.with_suffix(".svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--workloads", "nothing"],
        ["--ratios", "1:1:1"],
        ["--profile", "/nowhere"],
        ["--devices", "0"],
        ["--slo", "ttft=0.001,tpot=0.04"],
    ],
)
def test_what_makes_no_sense_is_said_before_anything_starts(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("article: ")
