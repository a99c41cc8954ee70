from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from epd.config import HttpConfig
from epd.gateway.prompt import Prompter
from epd.http.app import HttpServer
from tests.support.engine import ScriptedEngine
from tests.support.text import prompter

Start = Callable[..., Awaitable[HttpServer]]


def http_config(**changes: Any) -> HttpConfig:
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "api_key": "",
        "allow_image_hosts": (),
        "max_body_bytes": 2**20,
        "max_images": 4,
        "max_image_pixels": 2**24,
    }
    return HttpConfig(**{**values, **changes})


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts servers on free ports; keyword arguments are fields of HttpConfig or of HttpServer."""
    servers: list[HttpServer] = []

    async def start(
        engine: ScriptedEngine, *, made: Prompter | None = None, server: dict[str, Any] | None = None, **config: Any
    ) -> HttpServer:
        options = {"request_timeout_s": 60.0, **(server or {})}
        servers.append(HttpServer(http_config(**config), engine, made or prompter(), **options))
        await servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        await server.stop()
