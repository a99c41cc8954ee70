"""The process that parts run in, without one: what it says of a rig and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tools.bench.rows import make_row
from tools.gpu_check.child import run_parts
from tools.gpu_check.found import Found, Limits, Missing
from tools.gpu_check.order import Order

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
