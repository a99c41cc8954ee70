from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from epd.errors import BadImage
from epd.http import images
from epd.http.images import ImageFetcher, decode_data_url, is_public
from epd.http.messages import ImageSource
from tests.support.text import png

PARAM = "messages[0].content[1].image_url.url"
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[int]]


def source(url: str) -> ImageSource:
    return ImageSource(url, PARAM)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def serve(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> int:
        app = web.Application()
        app.router.add_get("/{name:.*}", handler)
        runners.append(web.AppRunner(app, shutdown_timeout=0.1))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return int(runners[-1].addresses[0][1])

    yield serve
    for runner in runners:
        await runner.cleanup()


async def refusal(fetcher: ImageFetcher, url: str) -> str:
    with pytest.raises(BadImage) as caught:
        await fetcher.fetch(source(url))
    await fetcher.close()
    assert caught.value.param == PARAM
    assert caught.value.message.startswith(PARAM)
    return caught.value.message


def here(*ports: int) -> ImageFetcher:
    """A fetcher that may talk to this machine, as a test must."""
    return ImageFetcher([f"localhost:{port}" for port in ports], address_allowed=lambda address: True)


# --- data URLs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media", ["image/png", "IMAGE/JPEG", "image/svg+xml", "image/x-icon"])
def test_data_urls_give_their_bytes(media: str) -> None:
    assert decode_data_url(f"data:{media};base64," + base64.b64encode(png()).decode()) == png()


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png,abc",
        "data:text/html;base64,QUJD",
        "data:image/png;charset=x;base64,QUJD",
        "data:image/png;base64,",
        "data:image/png;base64,QUJ",
        "data:image/png;base64,QUJD\n",
        "data:image/png;base64, QUJD",
        "data:image/png;base64,QUJD-_",
        "data:image/png;base64,QU=D",
        "data:image/png;base64,QUé=",
        " data:image/png;base64,QUJD",
    ],
)
async def test_bad_data_urls_are_refused(url: str) -> None:
    await refusal(ImageFetcher(()), url)


# --- where a URL may lead -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://elsewhere.example/x.png", "does not fetch images from that host"),
        ("http://sub.allowed.example/x.png", "does not fetch images from that host"),
        ("http://allowed.example.evil.example/", "does not fetch images from that host"),
        ("http://allowed.example:8080/", "does not fetch images from that host"),
        ("http://allowed.example@evil.example/", "user name"),
        ("http://u:p@allowed.example/", "user name"),
        ("http://evil.example#@allowed.example/", "does not fetch images from that host"),
        ("ftp://allowed.example/x.png", "data URL or an http(s) URL"),
        ("file:///etc/passwd", "data URL or an http(s) URL"),
        ("/etc/passwd", "data URL or an http(s) URL"),
        ("", "data URL or an http(s) URL"),
        ("http://", "data URL or an http(s) URL"),
        ("http://[::1", "not a URL"),
        ("http://allowed.example:99999/", "not a URL"),
    ],
)
async def test_urls_off_the_list_are_refused_without_a_look_up(monkeypatch: pytest.MonkeyPatch, url: str, words: str) -> None:
    async def look_up(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    assert words in await refusal(ImageFetcher(["allowed.example"]), url)


async def test_an_allowed_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(*args: Any, **kwargs: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "169.254.169.254")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    assert "not on the public internet" in await refusal(ImageFetcher(["Allowed.Example"]), "http://allowed.example/x.png")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "2130706433", "0x7f.1"])
async def test_an_allowed_host_on_this_machine_is_refused_unless_addresses_are_allowed(serve: Serve, host: str) -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(body=png())

    port = await serve(handler)
    fetcher = ImageFetcher([f"{host.strip('[]')}:{port}"])
    await refusal(fetcher, f"http://{host}:{port}/x.png")
    assert not asked


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "127.0.0.1.", "0x"])
async def test_an_address_in_another_notation_is_refused_without_a_look_up(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    async def look_up(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    assert "written in full" in await refusal(ImageFetcher([host]), f"http://{host}/x.png")


async def test_the_address_that_was_checked_is_the_one_connected_to(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once per download, however often its answer changes."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=request.headers["Host"].encode())

    port = await serve(handler)
    num_looks = 0

    async def look_up(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal num_looks
        num_looks += 1
        address = "127.0.0.1" if num_looks == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    loop = asyncio.get_running_loop()
    real = loop.getaddrinfo

    async def either(host: Any, *args: Any, **kwargs: Any) -> Any:
        return await (look_up() if host == "images.example" else real(host, *args, **kwargs))

    monkeypatch.setattr(loop, "getaddrinfo", either)
    fetcher = ImageFetcher([f"images.example:{port}"], address_allowed=lambda address: address == "127.0.0.1")
    assert await fetcher.fetch(source(f"http://images.example:{port}/")) == f"images.example:{port}".encode()
    assert num_looks == 1
    assert "not on the public internet" in await refusal(fetcher, f"http://images.example:{port}/")


# --- what comes back ------------------------------------------------------------------------------------------------


async def test_an_image_is_downloaded(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert "Cookie" not in request.headers
        return web.Response(body=png(), headers={"Set-Cookie": "a=b"})

    port = await serve(handler)
    fetcher = here(port)
    for _ in range(2):
        assert await fetcher.fetch(source(f"http://localhost:{port}/x.png?size=1")) == png()
    await fetcher.close()


@pytest.mark.parametrize(
    ("status", "words"), [(404, "status 404"), (500, "status 500"), (204, "status 204"), (302, "redirect"), (307, "redirect")]
)
async def test_other_answers_are_refused(serve: Serve, status: int, words: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.path == "/x.png"
        return web.Response(status=status, headers={"Location": "/other.png"})

    port = await serve(handler)
    assert words in await refusal(here(port), f"http://localhost:{port}/x.png")


async def test_a_download_that_is_too_large_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 100)
        except ConnectionError:
            return response

    port = await serve(handler)
    assert "more than 1000 bytes" in await refusal(here(port), f"http://localhost:{port}/")


async def test_a_download_that_hangs_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_DOWNLOAD_S", 0.05)
    gone = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        await gone.wait()
        return web.Response()

    port = await serve(handler)
    message = await refusal(here(port), f"http://localhost:{port}/")
    gone.set()
    assert "did not arrive" in message or "TimeoutError" in message


async def test_a_host_that_hangs_up_is_an_error_of_the_image(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    port = await serve(handler)
    assert "cannot be downloaded" in await refusal(here(port), f"http://localhost:{port}/")
