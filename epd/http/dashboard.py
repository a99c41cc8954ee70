"""The live view: one page that needs nothing from elsewhere, and the figures that it asks for again and again.

The page itself holds no secret and is open; its figures are behind the API's key, which the page asks for.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from aiohttp import web

from epd.errors import BadRequest
from epd.gateway.engine import Engine
from epd.http.routes import json_response

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Dashboard:
    """Handlers of /dashboard and /v1/cluster/live."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._page = resources.files("epd.http").joinpath("dashboard.html").read_bytes()
        self._headers = {
            "Content-Security-Policy": content_security_policy(self._page),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=self._headers)

    async def live(self, request: web.Request) -> web.Response:
        after_moment = _number(request, "after_moment", default=-1)
        after_revision = _number(request, "after_revision", default=0)
        response = json_response(self._engine.live(after_moment=after_moment, after_revision=after_revision))
        response.headers["Cache-Control"] = "no-store"
        response.enable_compression()
        return response


def content_security_policy(page: bytes) -> str:
    """What the page may do: run its own inline script and style, by their hashes, and ask this server."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        hashes[kind.decode()].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _number(request: web.Request, name: str, *, default: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?\d{1,15}", text):
        raise BadRequest(f"{name} is a whole number", param=name)
    return int(text)
