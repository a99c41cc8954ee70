"""The process that parts run in, without one: what it says of a rig and its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.tools.gpu_check.rigs import LOADS
from tools.bench.rows import make_row
from tools.gpu_check.budget import Budget
from tools.gpu_check.child import run_parts
from tools.gpu_check.figures.rig import Loads
from tools.gpu_check.findings import Findings
from tools.gpu_check.found import Found, Limits, Missing
from tools.gpu_check.order import Order
from tools.gpu_check.supervise import Group, Part, run_group

ROW = make_row("speed", 2.0, "GB/s", baseline=1.0, bar=">=1.5")


def told(parts: Mapping[str, Callable[[Any], Any]], order: Order) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    run_parts(order, lambda order: ("rig", parts), lambda event: events.append(dict(event)))
    return events


def test_what_is_found_is_said_as_it_is_found() -> None:
    def part(rig: str) -> Iterator[Found]:
        assert rig == "rig"
        yield Limits(3.0, 2.0, 1.0)
        yield ROW
        yield Missing("a figure", "nobody has it")

    begin, *found, end = told({"it": part}, Order(opener="", parts=["it"]))
    assert begin == {"begin": "it"}
    assert found == [
        {"limits": {"copy_bytes_per_s": 3.0, "read_bytes_per_s": 2.0, "flop_per_s": 1.0}},
        {"row": ROW},
        {"missing": {"name": "a figure", "reason": "nobody has it"}},
    ]
    assert end["end"] == "it"
    assert end["seconds"] >= 0


def test_a_part_that_raises_has_said_what_it_had() -> None:
    def part(rig: str) -> Iterator[Found]:
        yield ROW
        raise ValueError("not today")

    events = told({"it": part, "next": lambda rig: iter([ROW])}, Order(opener="", parts=["it", "next"]))
    assert [next(iter(event)) for event in events] == ["begin", "row", "failed", "begin", "row", "end"]
    assert events[2]["error"].endswith("ValueError: not today\n")


def test_a_rig_that_cannot_be_opened_breaks_all() -> None:
    events: list[dict[str, Any]] = []

    def open_rig(order: Order) -> tuple[Any, Mapping[str, Callable[[Any], Any]]]:
        raise RuntimeError("no device")

    run_parts(Order(opener="", parts=["it", "next"]), open_rig, lambda event: events.append(dict(event)))
    (event,) = events
    assert (event["failed"], event["all"]) == ("it", True)


def test_an_order_survives_the_way() -> None:
    order = Order(opener="a:b", parts=["it"], folder="f", loads={"rounds": 3}, limits={"flop_per_s": 1.0}, seconds=2.5)
    assert Order.from_json(order.to_json()) == order


def test_loads_survive_it_too() -> None:
    """Pairs are pairs again: they are keys of caches."""
    order = Order(opener="", parts=[], loads=asdict(LOADS))
    assert Loads.from_json(Order.from_json(order.to_json()).loads) == LOADS


def test_a_process_measures_its_parts_and_ends(tmp_path: Path) -> None:
    """All the way but for the device: one process, the limits handed from part to part, nothing of it left."""
    findings = Findings()
    group = Group((Part("limits", 60), Part("vision", 60), Part("no such part", 60)), "tests.tools.gpu_check.rigs:open_parts")

    def order(group: Group, parts: Sequence[str], seconds: float) -> Order:
        return Order(opener=group.opener, parts=parts, limits=findings.limits, seconds=seconds)

    run_group(group, Budget(100, time.monotonic), findings, order, log=tmp_path / "log", say=lambda text: None)
    assert findings.limits is not None
    assert findings.limits["flop_per_s"] > 0
    assert [row["name"] for row in findings.rows][-2] == "vision tower, 2 images of 64 x 64"
    assert findings.rows[-2]["baseline"] == findings.limits["flop_per_s"] / 1e12
    assert set(findings.seconds) == {"limits", "vision"}
    assert findings.broken["no such part"].strip().endswith("KeyError: 'no such part'")
