"""Sends one request and reads its answer. Whatever happens becomes an outcome; nothing is raised but cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

import aiohttp

from tools.loadgen.stream import FAILED, OK, REFUSED, UNFINISHED, AnswerStream, BadStream, Record
from tools.loadgen.workload import LoadRequest

TIMELINE_HEADER = "x-epd-timeline"  # epd answers with where a request's time went; others do not know it
_HEADERS: Mapping[str, str] = {"Content-Type": "application/json", "Accept": "text/event-stream"}
_REFUSED_STATUS = 429

Clock = Callable[[], float]


class Client:
    """One connection pool to one server. Every request in flight has its own connection.

    `timeline_share` of the requests, spread evenly, ask for the server's own timeline.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        timeout_s: float,
        clock: Clock,
        keeps_text: bool = True,
        timeline_share: float = 0.0,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._clock = clock
        self._keeps_text = keeps_text
        self._timeline_share = timeline_share
        self._num_asked = 0
        self._running: set[asyncio.Timeout] = set()
        self._is_cut_off = False

    async def ask(self, request: LoadRequest, scheduled_s: float | None = None, *, keeps_text: bool = False) -> Record:
        """Send `request` now; its latencies count from `scheduled_s` (None: from now)."""
        sent_s = self._clock()
        record = Record(
            index=request.index,
            scheduled_s=sent_s if scheduled_s is None else scheduled_s,
            sent_s=sent_s,
            turn=request.turn,
            kind=request.kind,
            num_images=request.num_images,
        )
        keeps_text = keeps_text or self._keeps_text or request.expect_text is not None
        answer = AnswerStream(record, keeps_text=keeps_text)
        limit = asyncio.timeout(0.0 if self._is_cut_off else self._timeout_s)
        self._running.add(limit)
        try:
            async with limit:
                await self._exchange(request, record, answer)
            _judge(request, record)
        except BadStream as error:
            _fail(record, error.reason, str(error))
        except TimeoutError:
            if self._is_cut_off:
                _fail(record, UNFINISHED, "the run was over before the answer was")
            else:
                _fail(record, "timeout", f"no end after {self._timeout_s:g} s")
        except aiohttp.ClientPayloadError as error:
            _fail(record, "truncated", str(error))
        except aiohttp.ClientConnectionError as error:  # refused, reset before an answer, host not found
            _fail(record, "connection", f"{type(error).__name__}: {error}")
        except aiohttp.ClientError as error:
            _fail(record, "bad_http", f"{type(error).__name__}: {error}")
        finally:
            self._running.discard(limit)
        record.end_s = record.end_s or self._clock()
        return record

    def cut_off(self) -> None:
        """End what still runs; it failed as "unfinished". Nothing is to be asked after this until `reopen`."""
        self._is_cut_off = True
        now = asyncio.get_running_loop().time()
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(now)

    def reopen(self) -> None:
        self._is_cut_off = False

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

    async def _exchange(self, request: LoadRequest, record: Record, answer: AnswerStream) -> None:
        clock = self._clock
        async with self._session.post(f"{self._url}/chat/completions", data=request.body, headers=self._headers()) as response:
            record.http_status = response.status
            if response.status != 200:
                code, text = _error(await response.text(errors="replace"))
                raise BadStream(f"{response.status} {code}".strip(), text)
            if response.content_type != "text/event-stream":
                raise BadStream("bad_content_type", response.content_type)
            try:
                read = response.content.readany
                while data := await read():
                    now_s = clock()
                    answer.feed(data, now_s)
                    if answer.is_done and not record.end_s:
                        record.end_s = now_s
            except BaseException:
                answer.settle()
                raise
            answer.close()

    def _headers(self) -> Mapping[str, str]:
        before, self._num_asked = self._num_asked, self._num_asked + 1
        is_next = int(self._num_asked * self._timeline_share) > int(before * self._timeline_share)
        return {**_HEADERS, TIMELINE_HEADER: "1"} if is_next else _HEADERS


def open_session(api_key: str = "") -> aiohttp.ClientSession:
    """A session without a limit on connections: the load decides how many there are."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), headers=headers, read_bufsize=1 << 20
    )


def _judge(request: LoadRequest, record: Record) -> None:
    if request.expect_tokens is not None and record.has_usage and record.output_tokens != request.expect_tokens:
        _fail(record, "wrong_length", f"{record.output_tokens} tokens instead of {request.expect_tokens}")
    elif request.expect_text is not None and record.text.strip() != request.expect_text.strip():
        _fail(record, "wrong_text", f"{record.text!r} instead of {request.expect_text!r}")
    else:
        record.outcome = OK


def _fail(record: Record, reason: str, detail: str) -> None:
    is_refusal = record.http_status == _REFUSED_STATUS
    record.outcome, record.reason, record.detail = REFUSED if is_refusal else FAILED, reason, detail


def _error(body: str) -> tuple[str, str]:
    """Code and message of an error's body, as far as it has them."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type") or ""), str(error["message"])[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", body[:500]
