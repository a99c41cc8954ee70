"""Sends one request and reads its answer. Whatever happens becomes an outcome; nothing is raised but cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import aiohttp

from tools.loadgen.stream import OK, REFUSED, AnswerStream, BadStream, Record
from tools.loadgen.workload import LoadRequest

Clock = Callable[[], float]


class Client:
    """One connection pool to one server. Every request in flight has its own connection."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, timeout_s: float, clock: Clock) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._clock = clock

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None) -> Record:
        """Send `request` now; its latencies count from `scheduled_s` (None: from now)."""
        sent_s = self._clock()
        record = Record(
            index=request.index,
            scheduled_s=sent_s if scheduled_s is None else scheduled_s,
            sent_s=sent_s,
            num_images=request.num_images,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(request, record)
            record.outcome, record.detail = _judge(request, record)
        except BadStream as error:
            record.outcome, record.detail = error.reason, str(error)
        except TimeoutError:
            record.outcome, record.detail = "timeout", f"no end after {self._timeout_s:g} s"
        except aiohttp.ClientPayloadError as error:
            record.outcome, record.detail = "cut", str(error)
        except aiohttp.ClientConnectionError as error:  # refused, reset before an answer, host not found
            record.outcome, record.detail = "connection", f"{type(error).__name__}: {error}"
        except aiohttp.ClientError as error:
            record.outcome, record.detail = "bad_http", f"{type(error).__name__}: {error}"
        record.end_s = record.end_s or self._clock()
        return record

    async def _exchange(self, request: LoadRequest, record: Record) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with self._session.post(f"{self._url}/chat/completions", data=request.body, headers=headers) as response:
            record.http_status = response.status
            if response.status != 200:
                reason = REFUSED if response.status == 429 else f"http_{response.status}"
                raise BadStream(reason, _error_text(await response.text(errors="replace")))
            if response.content_type != "text/event-stream":
                raise BadStream("bad_content_type", response.content_type)
            answer = AnswerStream(record)
            async for data in response.content.iter_any():
                now_s = self._clock()
                answer.feed(data, now_s)
                if answer.is_done:
                    record.end_s = now_s
            answer.close()

    async def first_model(self) -> str:
        """The name of the first model that the server lists.

        Raises:
            aiohttp.ClientError, TimeoutError: there is no server, or it has no such list.
        """
        async with asyncio.timeout(30), self._session.get(f"{self._url}/models") as response:
            response.raise_for_status()
            models = await response.json()
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise aiohttp.ClientError(f"{self._url}/models is no list of models: {str(models)[:200]}") from error


def open_session(api_key: str = "") -> aiohttp.ClientSession:
    """A session without a limit on connections: the load decides how many there are."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=headers, read_bufsize=1 << 20
    )


def _judge(request: LoadRequest, record: Record) -> tuple[str, str]:
    if request.expect_tokens is not None and record.has_usage and record.output_tokens != request.expect_tokens:
        return "wrong_length", f"{record.output_tokens} tokens instead of {request.expect_tokens}"
    if request.expect_text is not None and record.text.strip() != request.expect_text.strip():
        return "wrong_text", f"{record.text!r} instead of {request.expect_text!r}"
    return OK, ""


def _error_text(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return body[:500]
