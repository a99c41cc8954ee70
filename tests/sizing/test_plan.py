from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from epd.cli import main
from epd.emulated.profile import load_profile
from epd.errors import BadConfig
from epd.sizing.command import QWEN3_VL
from epd.sizing.plan import Targets, best_split, plan_devices, plan_rate, smallest
from epd.sizing.predict import Split, highest_rate
from epd.sizing.render import as_json, text
from epd.sizing.workload import Workload, num_patches, parse_workload
from tests.sizing.cases import DEVICE, IMAGES, MIXED, TEXT, sizing

TARGETS = Targets(1.0, 0.050)


@pytest.mark.parametrize("workload", [TEXT, IMAGES, MIXED], ids=["text", "images", "mixed"])
@pytest.mark.parametrize("rate", [0.5, 7.0, 90.0])
def test_the_fewest_devices_keep_the_targets_and_one_less_does_not(workload: Workload, rate: float) -> None:
    model = sizing(workload)
    split = smallest(model, TARGETS, rate)
    assert model.apart(split)(rate).holds(1.0, 0.050)
    assert (split.encode > 0) == (workload is not TEXT)
    for stage in ("encode", "prefill", "decode"):
        less = replace(split, **{stage: getattr(split, stage) - 1})
        if min(less.encode, less.prefill, less.decode) >= 1:
            at = model.apart(less)(rate)
            assert not at.holds(1.0, 0.050) or rate > 50, (stage, at)  # many devices are counted in larger steps


def test_no_other_split_of_a_few_devices_takes_more() -> None:
    model = sizing(MIXED)
    best = best_split(model, TARGETS, 7)
    rate = highest_rate(model.apart(best), 1.0, 0.050)
    others = [Split(e, p, 7 - e - p) for e in range(1, 6) for p in range(1, 7 - e)]
    assert best in others
    assert rate == max(highest_rate(model.apart(each), 1.0, 0.050) for each in others)


def test_a_thousand_devices_are_used_and_hardly_worse_each_than_seven() -> None:
    model = sizing(MIXED)
    few, many = (plan_devices(model, TARGETS, devices) for devices in (7, 1000))
    assert many.split.total == 1000
    assert many.apart.highest / 1000 >= 0.99 * few.apart.highest / 7
    assert 0.99 <= many.apart.at.busy["prefill"] <= 1.0 or many.apart.at.itl_s == pytest.approx(0.050, rel=0.05)


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(BadConfig, match="too few"):
        plan_devices(sizing(IMAGES), TARGETS, 2)
    with pytest.raises(BadConfig, match="no number of devices"):
        plan_rate(sizing(TEXT), Targets(0.05, 0.05), 1.0)
    with pytest.raises(BadConfig, match="no number of devices draws"):
        plan_rate(sizing(TEXT), Targets(1.0, 0.001), 1.0)
    with pytest.raises(BadConfig, match="no split"):
        plan_devices(sizing(TEXT), Targets(0.05, 0.05), 4)


def test_what_was_computed_is_marked_and_what_was_measured_is_not() -> None:
    plan = plan_rate(sizing(MIXED), TARGETS, 5.0)
    measured = msgspec.structs.replace(DEVICE, provenance="measured")
    assert "ROOFLINE, NOT MEASURED" in text(plan, TARGETS, DEVICE, "w")
    assert "ROOFLINE" not in text(plan, TARGETS, measured, "w")
    kept = as_json(plan, TARGETS, DEVICE, "w")
    assert kept["profile"]["provenance"] == "roofline"
    assert json.loads(json.dumps(kept, allow_nan=False))["split"] == {"encode": 1, "prefill": 1, "decode": 1}


def test_the_notation_of_workloads() -> None:
    found = parse_workload("text=1000,output=64,weight=3 + images=4x1080p", QWEN3_VL)
    assert [kind.weight for kind in found.kinds] == [3.0, 1.0]
    assert found.kinds[1].image_tokens == (2040,) * 4
    assert [share for share, _ in found.shares()] == [0.75, 0.25]
    assert parse_workload("images=1x1920x1080", QWEN3_VL).kinds[0].patches == (num_patches(1920, 1080, QWEN3_VL),)
    for wrong in ("images=4xfoo", "texts=5", "output=0", "weight=-1", "text=x", ""):
        with pytest.raises(BadConfig):
            parse_workload(wrong or "x", QWEN3_VL)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--devices", "8", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["split"].values()) == 8
    assert found["profile"]["device"] == load_profile("h200-qwen3-vl-8b").device
    for words in (["--rate", "5", "--slo", "ttft=1"], ["--devices", "0"], ["--rate", "1", "--profile", "/nowhere"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == 2
