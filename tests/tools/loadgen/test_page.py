from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.tools.loadgen.queue_model import QueueModel
from tools.loadgen.arrivals import Rate
from tools.loadgen.campaign import Harness, Load, Measured
from tools.loadgen.events import Event
from tools.loadgen.knee import KneeSearch
from tools.loadgen.mix import parse_mix
from tools.loadgen.page import report
from tools.loadgen.slo import Slo
from tools.loadgen.stream import Record
from tools.loadgen.waterfall import stage_times
from tools.loadgen.workload import WorkloadSpec

SLO = Slo(ttft=0.5, itl=0.2)
PROVENANCE = {"date": "2026-11-23", "command": "loadgen <x>", "machine": {"cpu": "a CPU", "cores": 2}}


async def runs_at(*rates: float) -> list[Measured]:
    model = QueueModel(0.02)
    harness = Harness(model, WorkloadSpec(model="m", mix=parse_mix("text,1x32x32")), SLO, clock=model.clock, sleep=model.sleep)
    return [await harness.measure(Load(rate=Rate(rate, rate), duration_s=10.0), number=n) for n, rate in enumerate(rates)]


def page_of(runs: list[Measured], **options: object) -> str:
    return report(runs, settings={"model": "m", "url": "http://x"}, provenance=PROVENANCE, slo=SLO, **options)  # type: ignore[arg-type]


class Outline(HTMLParser):
    """What the page holds and what it would load from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self._open = []

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h2", "h3"):
            self.headings.append(data)


def pictures(page: str) -> dict[str, ElementTree.Element]:
    found = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    names = [re.search(r'aria-label="([^"]*)"', svg) for svg in found]
    assert all(names)
    return {name[1]: ElementTree.fromstring(svg) for name, svg in zip(names, found, strict=True) if name}


async def test_one_run() -> None:
    (run,) = await runs_at(20.0)
    events = [Event(run.run.started_at + 1e-7, "fault", "d0 <died>"), Event(run.run.started_at - 5.0, "old", "long ago")]
    page = page_of([run], events=events)
    outline = Outline(page)
    assert outline.headings[:3] == ["Figures", "Latency", "Timeline"]
    assert outline.headings[3].startswith("Stages of requests (20 req/s)")
    assert set(pictures(page)) == {"Latency CDFs", "Timeline", "Stage waterfall"}
    assert outline.outside == [], "it needs no network"
    assert "script" not in outline.tags
    assert "d0 &lt;died&gt;" in page
    assert "<died>" not in page
    assert "long ago" not in page
    assert "SLO 500 ms" in page


async def test_a_sweep_with_a_knee() -> None:
    runs = await runs_at(10.0, 40.0, 80.0)
    search = KneeSearch(10.0)
    for run in runs:
        search.tell(run.load.rate.start if run.load.rate else 0.0, run.summary.good_share)
    page = page_of(runs, knee=search)
    shown = pictures(page)
    assert "Throughput against latency" in shown
    assert page.count('aria-label="Timeline"') == 3
    assert "knee: 40 requests/s" in page
    texts = {element.text for element in shown["Throughput against latency"].iter("{http://www.w3.org/2000/svg}text")}
    assert {"output tokens/s", "offered requests/s", "good", "10 req/s", "80 req/s"} <= texts


async def test_a_server_that_tells_no_stages_and_a_generator_that_was_late() -> None:
    (run,) = await runs_at(5.0)
    for record in run.run.records:
        record.spans = ()
    page = page_of([replace(run, summary=replace(run.summary, warnings=["its event loop was late"]))])
    assert "told nothing of its stages" in page
    assert 'class="warning"' in page
    assert "Stage waterfall" not in pictures(page)


async def test_a_run_in_which_nothing_succeeded() -> None:
    (run,) = await runs_at(5.0)
    for record in run.run.records:
        record.outcome, record.reason = "failed", "500"
    assert "Latency CDFs" in pictures(page_of([run]))


def test_overlapping_spans_of_a_kind_count_once() -> None:
    spans = [
        {"name": "encode", "stage": "encode", "worker": "e0", "start_s": 0.0, "end_s": 2.0},
        {"name": "encode", "stage": "encode", "worker": "e1", "start_s": 1.0, "end_s": 3.0},
        {"name": "encode", "stage": "encode", "worker": "e1", "start_s": 5.0, "end_s": 6.0},
        {"name": "prefill queue", "stage": "prefill", "worker": "p0", "start_s": 0.0, "end_s": 0.5},
        {"name": "something new", "stage": "decode", "worker": "d0", "start_s": 0.0, "end_s": 0.25},
    ]
    record = Record(0, 0.0, 0.0, outcome="ok", spans=spans)
    found = {name: (is_wait, values.mean_s) for name, is_wait, values in stage_times([record, Record(1, 0.0, 0.0)])}
    assert found == {"encode": (False, pytest.approx(4.0)), "prefill queue": (True, 0.5), "something new": (False, 0.25)}
