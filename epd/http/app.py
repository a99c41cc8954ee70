"""The HTTP server: routes, who may come in, what every response carries, and how it stops.

Owns the listening socket and the count of running requests. Does not know models or workers.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from importlib import metadata

from aiohttp import web

from epd.config import HttpConfig
from epd.errors import BadConfig, BodyTooLarge, EpdError, InternalError, Unavailable
from epd.gateway.engine import Engine
from epd.gateway.prompt import Prompter
from epd.http.answer import KEEP_ALIVE_S, PATIENCE_S
from epd.http.dashboard import Dashboard
from epd.http.errors import NotAuthorized, UnknownRoute, WrongMethod, error_response
from epd.http.images import Allowed, ImageFetcher, is_public
from epd.http.probes import HttpMetrics, Probes
from epd.http.routes import OpenAIRoutes, Timing
from epd.http.watch import IDLE_S, STALLED_S, ConnectionWatch
from epd.log import Log

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_CLOSE_S = 1.0  # for connections that are idle when the server stops
_log = Log("http")
_BACKLOG = 4096  # connections that wait to be accepted: a burst of clients must not be reset while the loop is busy


class HttpServer:
    """The endpoint. `start`, then `drain` and `stop`."""

    def __init__(
        self,
        config: HttpConfig,
        engine: Engine,
        prompter: Prompter,
        *,
        request_timeout_s: float,
        patience_s: float = PATIENCE_S,
        keep_alive_s: float = KEEP_ALIVE_S,
        idle_s: float = IDLE_S,
        stalled_s: float = STALLED_S,
        image_address_allowed: Allowed = is_public,
    ) -> None:
        self._config = config
        self._metrics = HttpMetrics()
        self._images = ImageFetcher(config.allow_image_hosts, address_allowed=image_address_allowed)
        timing = Timing(request_timeout_s=request_timeout_s, patience_s=patience_s, keep_alive_s=keep_alive_s)
        self._routes = OpenAIRoutes(config, engine, prompter, self._images, timing=timing, fingerprint=f"epd-{_version()}")
        self._probes = Probes(engine, self._metrics, lambda: self._draining)
        self._dashboard = Dashboard(engine)
        self._draining = False
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._idle_s = idle_s
        self._stalled_s = stalled_s
        self._runner: web.AppRunner | None = None
        self._watch: ConnectionWatch | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            BadConfig: the address cannot be listened on.
        """
        # handler_cancellation: a client that leaves cancels its handler, which closes the engine's generator.
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, access_log=None, logger=_protocol_log(), shutdown_timeout=_CLOSE_S
        )
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._watch = ConnectionWatch(lambda: server.connections, idle_s=self._idle_s, stalled_s=self._stalled_s)
        self._watch.start()
        try:
            await web.TCPSite(self._runner, self._config.host, self._config.port, backlog=_BACKLOG).start()
        except OSError as error:
            await self.stop()
            raise BadConfig(f"cannot listen on {self._config.host}:{self._config.port}: {error.strerror or error}") from error

    @property
    def url(self) -> str:
        """Where the endpoint is, with the port that was really taken."""
        assert self._runner is not None
        host, port = self._runner.addresses[0][:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; whether all of them finished in time. Probes go on answering."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Close everything; what is still running is cancelled."""
        self._draining = True
        if self._watch is not None:
            self._watch.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._images.close()
        await self._routes.close()

    # --- the application --------------------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        routes, probes, dashboard = self._routes, self._probes, self._dashboard
        app = web.Application(middlewares=[self._middleware], client_max_size=self._config.max_body_bytes)
        app.router.add_post("/v1/chat/completions", self._generation(routes.chat))
        app.router.add_post("/v1/completions", self._generation(routes.completions))
        app.router.add_get("/v1/models", routes.models)
        app.router.add_get("/v1/models/{model:.+}", routes.model)
        app.router.add_get("/v1/cluster", probes.cluster)
        app.router.add_get("/v1/cluster/live", dashboard.live)
        app.router.add_get("/dashboard", dashboard.page)
        app.router.add_get("/health", probes.health)
        app.router.add_get("/ready", probes.ready)
        app.router.add_get("/metrics", probes.metrics)
        app.on_response_prepare.append(_set_headers)
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Whoever fails, the answer is an error object; every response is counted."""
        route = request.match_info.route.resource
        name = route.canonical if route is not None else "other"
        assert self._watch is not None
        self._watch.began(request.protocol)
        try:
            if request.path.startswith("/v1/"):
                self._authorize(request)
            response = await handler(request)
        except EpdError as error:
            if error.http_status >= 500:
                _log.warning("request failed", route=name, code=error.code, error=error.message)
            response = error_response(error)
        except web.HTTPException as error:
            response = error_response(_from_aiohttp(request, error))
        except ConnectionError:
            self._metrics.count(name, 499)
            raise
        except Exception as error:
            _log.error("request failed", error=error, route=name)
            response = error_response(InternalError("internal error"))
        finally:
            self._watch.ended(request.protocol)
        self._metrics.count(name, response.status)
        return response

    def _authorize(self, request: web.Request) -> None:
        if not self._config.api_key:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_bytes(key.strip()), _bytes(self._config.api_key)):
            raise NotAuthorized("this endpoint asks for a key: send it as `Authorization: Bearer KEY`")

    def _generation(self, handler: _Handler) -> _Handler:
        """A handler that counts as running, and that a draining server does not start."""

        async def counted(request: web.Request) -> web.StreamResponse:
            if self._draining:
                raise Unavailable("this server is shutting down and takes no new requests")
            self._num_running += 1
            self._metrics.running.inc()
            self._idle.clear()
            try:
                return await handler(request)
            finally:
                self._num_running -= 1
                self._metrics.running.dec()
                if not self._num_running:
                    self._idle.set()

        return counted


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # as header fields are decoded


def _protocol_log() -> logging.Logger:
    """Bytes that are no HTTP are answered with 400; a traceback for each would let anybody fill the log."""
    logger = logging.getLogger("epd.http.protocol")
    logger.setLevel(logging.CRITICAL)
    return logger


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """The client's own id comes back; a client without one gets one to quote."""
    response.headers["Server"] = "epd"
    given = request.headers.get("X-Request-Id", "")
    response.headers["X-Request-Id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> EpdError:
    match error:
        case web.HTTPMethodNotAllowed():
            allow = ", ".join(sorted(error.allowed_methods))
            return WrongMethod(f"{request.path} takes {allow}, not {request.method}", allow=allow)
        case web.HTTPNotFound():
            return UnknownRoute(f"there is no {request.path[:200]} here")
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLarge("the request body is too large")
    return InternalError(f"the request was refused ({error.reason})")


def _version() -> str:
    try:
        return metadata.version("epd")
    except metadata.PackageNotFoundError:
        return "dev"
