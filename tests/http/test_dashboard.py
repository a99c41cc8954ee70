"""The live view without a browser: who may see what, what the page may do, and that it is whole.

What it looks like and does in a browser: `make check-dashboard`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from importlib import resources

import aiohttp
import pytest

from epd.http.dashboard import content_security_policy
from tests.http.conftest import Start
from tests.support.engine import ScriptedEngine

PAGE = resources.files("epd.http").joinpath("dashboard.html").read_text()
SCRIPT = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)[0]
NO_END = {"meta", "link", "input"}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def test_the_page_is_open_and_its_figures_are_behind_the_key(start: Start, session: aiohttp.ClientSession) -> None:
    server = await start(ScriptedEngine(), api_key="secret")
    async with session.get(server.url + "/dashboard") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "secret" not in await response.text()
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer secret"}, 200)):
        async with session.get(server.url + "/v1/cluster/live", headers=headers) as response:
            assert response.status == status


async def test_a_viewer_says_what_it_has_seen(start: Start, session: aiohttp.ClientSession) -> None:
    server = await start(ScriptedEngine())
    async with session.get(server.url + "/v1/cluster/live") as response:
        assert (await response.json())["after"] == [-1, 0]
        assert response.headers["Cache-Control"] == "no-store"
    async with session.get(server.url + "/v1/cluster/live?after_moment=12&after_revision=7") as response:
        assert (await response.json())["after"] == [12, 7]


@pytest.mark.parametrize("query", ["after_moment=x", "after_revision=1e3", "after_moment=", f"after_moment={'9' * 20}"])
async def test_what_is_no_number_is_refused(start: Start, session: aiohttp.ClientSession, query: str) -> None:
    server = await start(ScriptedEngine())
    async with session.get(f"{server.url}/v1/cluster/live?{query}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == query.partition("=")[0]


async def test_the_page_may_run_its_own_script_and_ask_its_own_server_and_no_more(
    start: Start, session: aiohttp.ClientSession
) -> None:
    server = await start(ScriptedEngine())
    async with session.get(server.url + "/dashboard") as response:
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        text = await response.text()
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert text == PAGE
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_a_script_that_was_changed_has_another_hash() -> None:
    page = PAGE.encode()
    assert content_security_policy(page) != content_security_policy(page.replace(b'"use strict";', b'"use strict"; '))


def test_nothing_comes_from_elsewhere() -> None:
    addresses = set(re.findall(r"\w+://[\w./-]+", PAGE))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=[\"'](?!data:)", PAGE)
    assert "@import" not in PAGE
    assert "url(" not in PAGE


def test_what_others_wrote_reaches_the_page_as_text_only() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "javascript:"):
        assert way not in PAGE
    # Neither inline handlers nor inline styles, which the policy would refuse.
    assert not re.search(r"<[^>]*\s(on\w+|style)=", PAGE)


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in NO_END:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def test_the_page_is_whole() -> None:
    checker = _Checker()
    checker.feed(PAGE)
    assert (checker.wrong, checker.open) == ([], [])
    assert len(set(checker.ids)) == len(checker.ids)
    asked = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert asked - set(checker.ids) == set()
    for opening, closing in ("()", "[]", "{}"):
        assert SCRIPT.count(opening) == SCRIPT.count(closing)


def test_both_colour_schemes_name_the_same_colours() -> None:
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL))
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)", PAGE)) | set(re.findall(r'"(--[\w-]+)"', SCRIPT))
    assert used - light == {"--key", "--stage"}


def _luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(scheme: int) -> None:
    """WCAG AA: 4.5 to 1 for everything that words are written in."""
    block = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"(--[\w-]+): (#\w+)", block))
    pages = [colours[name] for name in ("--page", "--card")]
    for name in ("--text", "--soft", "--encode", "--prefill", "--decode", "--good", "--warning", "--bad"):
        for page in [*pages, *([colours[f"{name}-page"]] if f"{name}-page" in colours else [])]:
            brighter, darker = sorted((_luminance(colours[name]), _luminance(page)), reverse=True)
            contrast = (brighter + 0.05) / (darker + 0.05)
            assert contrast >= 4.5, (name, page, contrast)
