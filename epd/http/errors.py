"""Errors as OpenAI's API says them: `{"error": {"message", "type", "param", "code"}}` with a status."""

from __future__ import annotations

import math

import msgspec
from aiohttp import web

from epd.errors import BadRequest, EpdError, Overloaded, Unavailable

_RETRY_UNAVAILABLE_S = 1


class NotAuthorized(EpdError):
    """The key that this endpoint asks for is missing or wrong."""

    code = "invalid_api_key"
    http_status = 401


class UnknownRoute(EpdError):
    code = "unknown_url"
    http_status = 404


class WrongMethod(EpdError):
    code = "method_not_allowed"
    http_status = 405

    def __init__(self, message: str, *, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow


class WrongContentType(EpdError):
    code = "unsupported_media_type"
    http_status = 415


class BodyTimeout(EpdError):
    """The client was too slow to send its request."""

    code = "request_timeout"
    http_status = 408


def error_body(error: EpdError) -> bytes:
    """The JSON object of an error, on one line."""
    param = error.param or None if isinstance(error, BadRequest) else None
    described = {"message": error.message, "type": _type(error), "param": param, "code": error.code}
    return msgspec.json.encode({"error": described})


def error_response(error: EpdError) -> web.Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, Unavailable):
        headers["Retry-After"] = str(_RETRY_UNAVAILABLE_S)
    elif isinstance(error, NotAuthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, WrongMethod):
        headers["Allow"] = error.allow
    return web.Response(body=error_body(error), status=error.http_status, content_type="application/json", headers=headers)


def _type(error: EpdError) -> str:
    match error.http_status:
        case 401:
            return "authentication_error"
        case 429:
            return "rate_limit_error"
        case status if status < 500:
            return "invalid_request_error"
    return "server_error"
