"""`make check-dashboard`: the live view in a real headless Chromium, over a real cluster of processes.

Not collected by `make test`: it needs a browser, which the Makefile asks for by name. With EPD_SCREENSHOTS=FOLDER what was seen
is kept there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.e2e.mix import data_url
from tests.support.browser import Page, browser
from tests.support.cluster import MODEL_NAME, SMALL, WAIT_S, Process, ProcessCluster, children, process_cluster
from tests.support.text import png

DESK, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with process_cluster(encode=1, prefill=1, decode=2) as running:
        yield running


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with browser(tmp_path / "profile") as opened:
        await opened.look(width=DESK[0], height=DESK[1])
        yield opened
        assert opened.complaints == []


class Asking(threading.Thread):
    """A request that is answered while the test goes on."""

    def __init__(self, url: str, prompt: object, **options: object) -> None:
        super().__init__(daemon=True)
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": prompt}], "temperature": 0, **options}
        headers = {"Content-Type": "application/json"}
        self._request = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers)
        self.text = ""
        self.start()

    def run(self) -> None:
        with urllib.request.urlopen(self._request, timeout=WAIT_S) as answer:
            self.text = json.load(answer)["choices"][0]["message"]["content"]

    async def answered(self) -> str:
        await asyncio.to_thread(self.join, WAIT_S)
        return self.text


def _long(url: str) -> Asking:
    return Asking(url, "Count from 1 to 9.", max_tokens=3000, ignore_eos=True)


def _picture(url: str) -> Asking:
    return Asking(url, [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "How many?"}])


async def _keep(page: Page, name: str) -> None:
    folder = os.environ.get("EPD_SCREENSHOTS")
    if folder:
        os.makedirs(folder, exist_ok=True)
        await page.screenshot(Path(folder) / f"{name}.png")


async def test_an_idle_cluster_says_so(cluster: ProcessCluster, page: Page) -> None:
    await page.open(f"{cluster.url}/dashboard")
    await page.until("document.querySelector('#state').textContent === 'ready'", "the cluster to be shown as ready")
    text = await page.text()
    for words in (
        "encode-0",
        "prefill-0",
        "decode-0",
        "decode-1",
        "No request has come yet",
        "Nothing has moved",
        "worker joined",
    ):
        assert words in text, words
    await _keep(page, "idle")


async def test_a_request_is_seen_while_it_runs_and_after(cluster: ProcessCluster, page: Page) -> None:
    await page.open(f"{cluster.url}/dashboard")
    running = _long(cluster.url)
    await page.until("document.querySelector('#requests').innerText.includes('streams')", "a running request")
    assert "1 request running" in await page.text("#state")
    await running.answered()
    await page.until("document.querySelector('#requests').innerText.includes('✓ ok')", "the request to have ended")
    await _picture(cluster.url).answered()
    await page.until("document.querySelector('#requests').innerText.includes('1 image')", "the request with an image")
    await page.evaluate("document.querySelector('#requests details').open = true")
    await page.until("document.querySelector('#requests table') !== null", "its spans")
    spans = await page.text("#requests table")
    for words in ("encode", "prefill chunk", "transfer", "decode", "encode-0", "prefill-0"):
        assert words in spans, words
    # It stays open while the page goes on changing, and the figures have come.
    await page.until("document.querySelector('#chart-ttft polyline, #chart-ttft circle') !== null", "a time to first token")
    assert await page.evaluate("document.querySelector('#requests details').open")
    assert "mapped" in await page.text("#links")
    assert await page.evaluate("document.querySelectorAll('#topology path.rung-mapped').length") >= 2
    await page.until("!document.querySelector('#tiles').innerText.includes('\\u2013')", "latencies in the tiles")


async def test_it_fits_a_desk_and_a_phone_by_day_and_by_night(cluster: ProcessCluster, page: Page) -> None:
    await page.open(f"{cluster.url}/dashboard")
    await page.until("document.querySelectorAll('#requests details').length", "requests")
    colours = set()
    for width, height in (DESK, PHONE):
        for dark in (False, True):
            await page.look(width=width, height=height, dark=dark, phone=width < 500)
            await page.until(
                f"innerWidth === {width} && matchMedia('(prefers-color-scheme: dark)').matches === {str(dark).lower()}", "it"
            )
            await page.until("document.querySelector('#topology svg').clientWidth <= innerWidth", "the topology to fit")
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            colours.add((dark, await page.evaluate("getComputedStyle(document.body).backgroundColor")))
            await _keep(page, f"{'phone' if width < 500 else 'desk'}-{'dark' if dark else 'light'}")
    assert len(colours) == 2


async def test_the_death_of_a_worker_is_seen_and_survived(cluster: ProcessCluster, page: Page) -> None:
    await page.open(f"{cluster.url}/dashboard")
    await page.until("document.querySelector('#state').textContent === 'ready'", "the cluster")
    running = _long(cluster.url)
    await page.until("document.querySelector('#requests').innerText.includes('streams')", "a running request")
    victim = next(
        worker["worker"]
        for worker in cluster.describe()["workers"]
        if any(stage["role"] == "decode" and stage["num_running"] for stage in worker["stages"])
    )
    pid = cluster.kill(victim)
    shown = f"[data-worker={victim!r}]"
    await page.until(f'document.querySelector("{shown}[data-lost]") !== null', "the worker to be shown as lost")
    assert f"{victim} died or hung" in await page.text("#alerts")
    assert "worker lost" in await page.text("#events")
    await _keep(page, "lost")
    assert (await running.answered()).startswith("1 2 3")
    await page.until("document.querySelector('#requests').innerText.includes('2 attempts')", "the second attempt")
    await asyncio.to_thread(cluster.wait_for_workers, [victim], other_than=[pid])
    await page.until(f'document.querySelector("{shown}:not([data-lost])") !== null', "the worker to be back")
    await page.until("document.querySelector('#alerts').innerText === ''", "the alert to end")
    assert "joined again" in await page.text("#events")
    await _keep(page, "back")


async def test_the_gateway_may_die_too(cluster: ProcessCluster, page: Page) -> None:
    await page.open(f"{cluster.url}/dashboard")
    await page.until("document.querySelector('#state').textContent === 'ready' && seen.requests.length", "what has been")
    before = await page.evaluate("seen.live.uptime_s")
    os.kill(_gateway(cluster), signal.SIGKILL)
    await page.until(f"seen.live && seen.live.uptime_s < {before}", "another gateway")
    await page.until("document.querySelector('#state').textContent === 'ready'", "the gateway to be back")
    await page.until("document.querySelectorAll('#topology [data-worker]:not([data-lost])').length === 4", "all workers")
    assert "No request has come yet" in await page.text("#requests")
    assert "worker joined" in await page.text("#events")
    page.complaints[:] = [complaint for complaint in page.complaints if "ERR_CONNECTION" not in complaint]


async def test_a_key_is_asked_for(page: Page) -> None:
    process = Process("serve", "--port", "0", "--api-key", "a key", *SMALL)
    try:
        url = process.line(r"epd is ready at (\S+)")[1]
        await page.open(f"{url}/dashboard")
        await page.until("!document.querySelector('#ask-key').hidden", "the question for the key")
        await page.evaluate("document.querySelector('#key').value = 'wrong', document.querySelector('#key-form').requestSubmit()")
        await page.until("document.querySelector('#key-wrong').textContent !== ''", "the key to be refused")
        await page.evaluate("document.querySelector('#key').value = 'a key', document.querySelector('#key-form').requestSubmit()")
        await page.until("document.querySelector('#state').textContent === 'ready'", "the figures")
        assert await page.evaluate("document.querySelector('#ask-key').hidden")
    finally:
        process.close()
    await page.until("document.querySelector('#state').textContent.includes('does not answer')", "the page to notice the end")
    assert "gateway-encode-prefill-decode" in await page.text("#workers")  # what it knew is still there
    page.complaints[:] = [each for each in page.complaints if "401" not in each and "ERR_CONNECTION" not in each]


def _gateway(cluster: ProcessCluster) -> int:
    """The process that is no worker."""
    workers = set(cluster.workers().values())
    return next(pid for pid in children(cluster.process.pid) if pid not in workers)
