"""Lengths, mixes and traces as they are written on the command line and in files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tools.loadgen.lengths import Lengths, parse_lengths
from tools.loadgen.mix import MixClass, parse_mix, pick
from tools.loadgen.trace import TraceEntry, read_trace


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("32", Lengths(32, 32)),
        ("16-64", Lengths(16, 64)),
        ("lognormal:200:0.8:2000", Lengths(1, 2000, 200, 0.8)),
        ("lognormal:100:0.5", Lengths(1, 1600, 100, 0.5)),
    ],
)
def test_lengths_as_words(text: str, lengths: Lengths) -> None:
    assert parse_lengths(text) == lengths
    assert parse_lengths(str(lengths)) == lengths


@pytest.mark.parametrize(
    "text", ["", "0", "5-3", "a", "lognormal", "lognormal:0:1", "lognormal:9:-1", "lognormal:9:1:5", "normal:1:1"]
)
def test_no_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        parse_lengths(text)


def test_lengths_are_drawn_as_they_say() -> None:
    rng = np.random.default_rng(0)
    assert {Lengths(7, 7).draw(rng) for _ in range(20)} == {7}
    assert {Lengths(3, 5).draw(rng) for _ in range(200)} == {3, 4, 5}
    drawn = [Lengths(1, 10_000, 200, 0.7).draw(rng) for _ in range(20_000)]
    assert np.mean(drawn) == pytest.approx(200, rel=0.03)
    assert np.std(np.log(drawn)) == pytest.approx(0.7, rel=0.03)
    assert max(Lengths(1, 300, 200, 0.7).draw(rng) for _ in range(1000)) == 300


def test_a_mix_as_words() -> None:
    assert parse_mix("text:50, 1x1080p:30,4x640x480") == (
        MixClass("text", 50),
        MixClass("1x1080p", 30, 1, (1920, 1080)),
        MixClass("4x640x480", 1, 4, (640, 480)),
    )
    assert parse_mix("2x4k:1")[0].size == (3840, 2160)


@pytest.mark.parametrize(
    "text",
    ["", "video", "text:x", "text:-1", "text:0", "0x720p", "1x999p", "1x1x1", "text,text", "1x720p:inf", "x720p", "2000x720p"],
)
def test_no_mix(text: str) -> None:
    with pytest.raises(ValueError, match=r"weight|neither|twice"):
        parse_mix(text)


def test_classes_are_picked_by_weight() -> None:
    classes = parse_mix("text:50,1x240p:0,1x720p:30,4x480p:20")
    found = [pick(classes, draw).name for draw in np.linspace(0, 1, 1000, endpoint=False)]
    assert [found.count(each.name) for each in classes] == [500, 0, 300, 200]
    assert pick(classes, 1.0).name == "4x480p"
    assert pick(parse_mix("text:1,1x240p:0"), 1.0).name == "text"


def test_a_trace() -> None:
    lines = [
        json.dumps({"timestamp": 5000, "input_length": 700, "output_length": 20, "hash_ids": [4, 9]}),
        "",
        json.dumps({"timestamp": 2000.5, "input_length": 3, "output_length": 1, "extra": "x"}),
    ]
    assert read_trace(lines) == (TraceEntry(0.0, 3, 1), TraceEntry(2.9995, 700, 20, (4, 9)))
    assert read_trace(lines, speed=2.0)[1].at_s == pytest.approx(1.49975)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([""], "no entry"),
        (["{}"], "line 1"),
        (["", "nope"], "line 2"),
        (['{"timestamp": "1", "input_length": 1, "output_length": 1}'], "timestamp"),
        (['{"timestamp": 1, "input_length": 0, "output_length": 1}'], "lengths"),
        (['{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}'], "hash_ids"),
    ],
)
def test_no_trace(lines: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_trace(lines)
