from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from epd.cli import main
from epd.devices import parse_workers
from epd.emulated.profile import TextCosts, load_profile
from epd.errors import BadConfig
from epd.sizing.command import QWEN3_VL
from epd.sizing.plan import Targets, best_split, plan_devices, plan_rate, pooled_shape, smallest, split_shape
from epd.sizing.predict import Split, highest_rate
from epd.sizing.render import as_json, text
from epd.sizing.workload import Workload, num_patches, parse_workload
from tests.sizing.cases import DEVICE, IMAGES, MIXED, TEXT, sizing

TARGETS = Targets(1.0, 0.050)


@pytest.mark.parametrize(
    ("workload", "with_encode"),
    [(TEXT, False), (IMAGES, True), (IMAGES, False), (MIXED, True), (MIXED, False)],
    ids=["text", "images", "images EP", "mixed", "mixed EP"],
)
@pytest.mark.parametrize("rate", [0.5, 7.0, 90.0])
def test_the_fewest_devices_keep_the_targets_and_one_less_does_not(workload: Workload, with_encode: bool, rate: float) -> None:
    model = sizing(workload)
    split = smallest(model, TARGETS, rate, with_encode=with_encode)
    assert model.apart(split)(rate).holds(1.0, 0.050)
    assert (split.encode > 0) == with_encode
    for stage in ("encode", "prefill", "decode"):
        less = replace(split, **{stage: getattr(split, stage) - 1})
        if min(less.encode + (not with_encode), less.prefill, less.decode) >= 1:
            at = model.apart(less)(rate)
            assert not at.holds(1.0, 0.050) or rate > 50, (stage, at)  # many devices are counted in larger steps


@pytest.mark.parametrize("with_encode", [True, False])
def test_no_other_split_of_a_few_devices_takes_more(with_encode: bool) -> None:
    model = sizing(MIXED)
    best = best_split(model, TARGETS, 7, with_encode=with_encode)
    assert best is not None
    rate = highest_rate(model.apart(best), 1.0, 0.050)
    others = [Split(e, p, 7 - e - p) for e in (range(1, 6) if with_encode else [0]) for p in range(1, 7 - e)]
    assert best in others
    assert rate == max(highest_rate(model.apart(each), 1.0, 0.050) for each in others)


def test_the_answer_is_the_shape_that_takes_the_highest_rate() -> None:
    for workload in (TEXT, IMAGES, MIXED):
        plan = plan_devices(sizing(workload), TARGETS, 7)
        ours = [plan.answer, *(each for each in plan.others if each.workers)]
        assert len(ours) == (2 if workload is TEXT else 3)
        assert {sum(parse_workers(each.workers).values()) for each in ours} == {7}
        assert plan.answer.highest >= max(each.highest for each in ours) / 1.03
        assert plan.answer.at.rate == plan.answer.highest


def test_tokens_that_must_come_evenly_are_drawn_apart() -> None:
    """Every step that has a prompt's chunk in it takes 100 ms here, one without 10 ms."""
    profile = msgspec.structs.replace(DEVICE, text=TextCosts(((1, 0.010), (64, 0.010), (65, 0.1), (600, 0.1)), 0.0, 1e-6))
    model = replace(sizing(TEXT), profile=profile)
    loose, tight = (plan_devices(model, Targets(2.0, itl_s), 6) for itl_s in (0.3, 0.012))
    assert loose.answer.workers == "prefill+decode:6"
    assert parse_workers(tight.answer.workers).keys() == {"prefill", "decode"}


def test_the_fewest_devices_of_any_shape() -> None:
    for rate in (1.0, 5.0, 20.0):
        model = sizing(IMAGES)
        plan = plan_rate(model, TARGETS, rate)
        assert plan.answer.at.holds(1.0, 0.050)
        shapes = [pooled_shape(model, number) for number in range(1, plan.answer.devices)]
        shapes += [split_shape(model, Split(0, number, 1)) for number in range(1, plan.answer.devices - 1)]
        assert not any(shape.predict(rate).holds(1.0, 0.050) for shape in shapes)
        assert all(each.devices >= plan.answer.devices for each in plan.others)


def test_two_devices_are_enough_for_images() -> None:
    plan = plan_devices(sizing(IMAGES), TARGETS, 2)
    assert {each.workers for each in (plan.answer, *plan.others)} == {
        "encode+prefill+decode:2",
        "encode+prefill:1,decode:1",
        "",
    }


def test_a_thousand_devices_are_used_and_hardly_worse_each_than_seven() -> None:
    model = sizing(MIXED)
    few, many = (plan_devices(model, TARGETS, devices) for devices in (7, 1000))
    assert many.answer.devices == sum(parse_workers(many.answer.workers).values()) == 1000
    assert many.answer.highest / 1000 >= 0.99 * few.answer.highest / 7
    assert many.answer.at.bottleneck in next(iter(many.answer.at.busy)) or many.answer.at.itl_s == pytest.approx(0.050, rel=0.05)


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(BadConfig, match="no number of devices"):
        plan_rate(sizing(TEXT), Targets(0.05, 0.05), 1.0)
    with pytest.raises(BadConfig, match="no number of devices draws"):
        plan_rate(sizing(TEXT), Targets(1.0, 0.001), 1.0)
    with pytest.raises(BadConfig, match="4 devices do not keep TTFT"):
        plan_devices(sizing(TEXT), Targets(0.05, 0.05), 4)


def test_what_was_computed_is_marked_and_what_was_measured_is_not() -> None:
    plan = plan_rate(sizing(MIXED), TARGETS, 5.0)
    measured = msgspec.structs.replace(DEVICE, provenance="measured")
    assert "ROOFLINE, NOT MEASURED" in text(plan, TARGETS, DEVICE, "w")
    assert "ROOFLINE" not in text(plan, TARGETS, measured, "w")
    kept = as_json(plan, TARGETS, DEVICE, "w")
    assert kept["profile"]["provenance"] == "roofline"
    again = json.loads(json.dumps(kept, allow_nan=False))["answer"]
    assert again["devices"] == sum(parse_workers(again["workers"]).values())


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
    assert found["answer"]["devices"] == sum(parse_workers(found["answer"]["workers"]).values()) == 8
    assert found["profile"]["device"] == load_profile("h200-qwen3-vl-8b").device
    for words in (["--rate", "5", "--slo", "ttft=1"], ["--devices", "0"], ["--rate", "1", "--profile", "/nowhere"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == 2
