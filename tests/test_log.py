from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from epd.log import Log, setup


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger("epd")
    before = (root.handlers[:], root.propagate, root.level)
    yield
    root.handlers[:], root.propagate, root.level = before[0], before[1], before[2]


def test_a_line_is_an_event_and_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    setup("info", worker="decode-0")
    log = Log("fleet")
    log.info("worker joined", worker="encode-1", took_s=0.123456, why="two words", empty="")
    log.debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("decode-0 epd.fleet: worker joined worker=encode-1 took_s=0.1235 why='two words' empty=''")


def test_an_error_brings_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    setup("warning", worker="w")
    try:
        raise ValueError("out of luck")
    except ValueError as error:
        Log("x").error("a step failed", error=error)
    text = capsys.readouterr().err
    assert "error='ValueError: out of luck'" in text
    assert "Traceback" in text
