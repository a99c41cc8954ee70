"""The server over plain HTTP: what every response carries, who may come in, how it waits, stops and notices clients leaving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from epd.errors import BadConfig, InternalError
from epd.http.app import HttpServer
from epd.request import Delta
from tests.http.conftest import Start, http_config
from tests.support.engine import MODEL, Pause, ScriptedEngine
from tests.support.text import prompter

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAMED = {**BODY, "stream": True}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# --- timelines ------------------------------------------------------------------------------------------------------


async def test_a_timeline_comes_with_the_answer_where_it_was_asked_for(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    server = await start(engine)
    for body in ({**STREAMED, "stream_options": {"include_usage": True}}, STREAMED, BODY):
        async with session.post(server.url + CHAT, json=body, headers={"x-epd-timeline": "1"}) as response:
            text = await response.text()
        last = json.loads(text.split("\n\n")[-3].removeprefix("data: ")) if "stream" in body else json.loads(text)
        assert [span["name"] for span in last["epd"]["spans"]] == ["fetch", "tokenize"]
        assert all(span["stage"] == "http" and 0 <= span["start_s"] <= span["end_s"] for span in last["epd"]["spans"])
        assert engine.last.timeline is not None
    completion = {"model": MODEL, "prompt": "x"}
    async with session.post(server.url + "/v1/completions", json=completion, headers={"x-epd-timeline": "1"}) as response:
        assert [span["name"] for span in (await response.json())["epd"]["spans"]] == ["tokenize"]


@pytest.mark.parametrize(("headers", "status"), [({}, 200), ({"x-epd-timeline": "0"}, 200), ({"x-epd-timeline": "yes"}, 400)])
async def test_no_timeline_without_asking(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine, headers: dict[str, str], status: int
) -> None:
    server = await start(engine)
    async with session.post(server.url + CHAT, json=STREAMED, headers=headers) as response:
        assert response.status == status
        assert '"epd":' not in await response.text()


async def test_every_prompt_has_a_timeline_of_its_own_that_began_when_the_request_came(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    server = await start(engine)
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "x" * 2000}
    body = {"model": MODEL, "prompt": [[1], [1, 2]]}
    async with session.post(server.url + "/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200
    first, second = (request.timeline for request in engine.requests)
    assert first is not None
    assert second is not None
    assert first is not second
    assert [span.name for span in first.spans()] == [span.name for span in second.spans()] == ["tokenize"]
    assert abs(first.now() - second.now()) < first.spans()[0].end_s + 1.0
    assert {request.traceparent for request in engine.requests} == {headers["traceparent"]}
    assert {len(request.tracestate) for request in engine.requests} == {512}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("POST", CHAT, {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400, "bad_request"),
        ("POST", CHAT, {"data": b"", "headers": {"Content-Type": "application/json"}}, 400, "bad_request"),
        ("POST", CHAT, {"json": {**BODY, "tools": [{}]}}, 400, "unsupported"),
        ("POST", CHAT, {"data": b"{}"}, 415, "unsupported_media_type"),
        ("POST", CHAT, {"data": {"a": "b"}}, 415, "unsupported_media_type"),
        ("POST", CHAT, {"json": BODY, "headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type"),
        ("POST", CHAT, {"json": {**BODY, "model": "other"}}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"json": {"model": "other", "prompt": "x"}}, 404, "model_not_found"),
        ("GET", "/v1/models/some/model", {}, 404, "model_not_found"),
        ("GET", CHAT, {}, 405, "method_not_allowed"),
        ("DELETE", "/health", {}, 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", {"json": {}}, 404, "unknown_url"),
        ("GET", "/", {}, 404, "unknown_url"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said_as_an_error_object(
    start: Start,
    session: aiohttp.ClientSession,
    engine: ScriptedEngine,
    method: str,
    path: str,
    options: dict[str, Any],
    status: int,
    code: str,
) -> None:
    server = await start(engine)
    async with session.request(method, server.url + path, **options) as response:
        assert response.status == status
        assert (await error_of(response))["code"] == code
        if status == 405:
            assert response.headers["Allow"]
    assert not engine.requests


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine, declared: bool
) -> None:
    server = await start(engine, max_body_bytes=1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    data = b" " * 1001 if declared else pieces()
    async with session.post(server.url + CHAT, data=data, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 413
        assert "1000 bytes" in (await error_of(response))["message"]


async def test_a_body_of_exactly_the_limit_is_taken(start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine) -> None:
    data = json.dumps(BODY).encode()
    server = await start(engine, max_body_bytes=len(data))
    async with session.post(server.url + CHAT, data=data, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 200


async def test_large_bodies_are_worked_on_beside_the_loop(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    server = await start(engine, made=prompter(max_model_len=200_000))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a b " * 25_000}]}
    async with session.post(server.url + CHAT, json=body) as response:
        assert response.status == 200
    assert len(engine.last.token_ids) > 50_000


async def test_a_mistake_of_ours_is_an_error_object_without_details(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    engine.script = lambda request: [ZeroDivisionError("secret")]
    server = await start(engine)
    for body in (BODY, STREAMED):
        async with session.post(server.url + CHAT, json=body) as response:
            assert response.status == 500
            assert "secret" not in (await error_of(response))["message"]


@pytest.mark.parametrize("body", [BODY, STREAMED])
async def test_an_engine_that_ends_early_is_an_error(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine, body: dict[str, Any]
) -> None:
    engine.script = lambda request: [Delta(0, "x", 1)]
    server = await start(engine)
    async with session.post(server.url + CHAT, json=body) as response:
        assert b"before all choices were finished" in await response.read()
    engine.script = lambda request: []
    async with session.post(server.url + CHAT, json=body) as response:
        assert response.status == 500


# --- keys and ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic secret", 401), ("secret", 401), ("Bearer secret", 200), ("bearer  secret", 200)],
)
async def test_a_key_is_asked_for_where_there_is_one(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine, header: str | None, status: int
) -> None:
    server = await start(engine, api_key="secret")
    headers = {"Authorization": header} if header else {}
    for path in ("/v1/models", "/v1/cluster"):
        async with session.get(server.url + path, headers=headers) as response:
            assert response.status == status
            if status == 401:
                assert (await error_of(response))["type"] == "authentication_error"
                assert response.headers["WWW-Authenticate"] == "Bearer"
    async with session.post(server.url + CHAT, json=BODY, headers=headers) as response:
        assert response.status == status
    for path in ("/health", "/ready", "/metrics"):
        async with session.get(server.url + path) as response:
            assert response.status == 200


async def test_a_key_of_odd_bytes_is_wrong_and_no_more(start: Start, engine: ScriptedEngine) -> None:
    server = await start(engine, api_key="secret")
    reader, writer = await _connect(server)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 401")
    writer.close()


async def test_every_response_has_a_request_id(start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine) -> None:
    server = await start(engine)
    for body in (BODY, STREAMED, {}):
        async with session.post(server.url + CHAT, json=body, headers={"X-Request-Id": "mine-1"}) as response:
            assert response.headers["X-Request-Id"] == "mine-1"
    ids = set()
    for headers in ({}, {}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 200}):
        async with session.get(server.url + "/health", headers=headers) as response:
            ids.add(response.headers["X-Request-Id"])
    assert len(ids) == 4
    assert all(len(given) == 32 for given in ids)


# --- probes ---------------------------------------------------------------------------------------------------------


async def test_probes(start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine) -> None:
    server = await start(engine)
    async with session.get(server.url + "/health") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with session.get(server.url + "/ready") as response:
        assert (response.status, (await response.json())["ready"]) == (200, True)
    engine.is_ready = (False, "no prefill worker")
    async with session.get(server.url + "/ready") as response:
        assert (response.status, (await response.json())["reason"]) == (503, "no prefill worker")
    async with session.get(server.url + "/v1/cluster") as response:
        assert await response.json() == engine.cluster()
    async with session.get(server.url + "/metrics") as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith("text/plain")
    assert "epd_test 1.0" in text
    assert 'epd_http_responses_total{route="/ready",status="503"} 1.0' in text
    assert "epd_http_running_requests 0.0" in text


# --- streams --------------------------------------------------------------------------------------------------------


async def test_the_bytes_of_a_stream(start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine) -> None:
    server = await start(engine)
    async with session.post(server.url + CHAT, json=STREAMED) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        events = (await response.read()).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert json.loads(events[0].removeprefix(b"data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(events) == 1 + 3 + 2


async def test_an_error_ends_a_stream_without_done(start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine) -> None:
    server = await start(engine)
    for error, message in ((InternalError("our words"), "our words"), (ValueError("secret"), "internal error")):
        engine.script = lambda request, error=error: [Delta(0, "x", 1), error]  # type: ignore[misc]
        async with session.post(server.url + CHAT, json=STREAMED) as response:
            assert response.status == 200
            events = (await response.read()).split(b"\n\n")
        name, data = events[-2].split(b"\n")
        assert name == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == message


async def test_a_stream_that_waits_is_kept_open_by_comments(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    pause = Pause()
    engine.script = lambda request: [pause, Delta(0, "x", 1), Delta(0, "", 1, finish_reason="stop")]
    server = await start(engine, server={"patience_s": 0.01, "keep_alive_s": 0.01})
    async with session.post(server.url + CHAT, json=STREAMED) as response:
        seen = b""
        while seen.count(b": keep-alive\n\n") < 2:
            seen += await response.content.readany()
        assert seen.startswith(b"data: ")  # the role comes before any wait
        pause.go_on.set()
        seen += await response.read()
    assert seen.endswith(b"data: [DONE]\n\n")


async def test_an_error_after_the_first_wait_is_an_event(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    pause = Pause()
    engine.script = lambda request: [pause, InternalError("late")]
    server = await start(engine, server={"patience_s": 0.01})
    async with session.post(server.url + CHAT, json=STREAMED) as response:
        assert response.status == 200
        pause.go_on.set()
        assert b"event: error" in await response.read()


# --- clients that leave ---------------------------------------------------------------------------------------------


async def _connect(server: HttpServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def _post(server: HttpServer, body: dict[str, Any], path: str = CHAT) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await _connect(server)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
async def test_a_client_that_leaves_closes_the_engines_generator(
    start: Start, engine: ScriptedEngine, stream: bool, started: bool
) -> None:
    pause = Pause()
    engine.script = lambda request: [*([Delta(0, "x", 1)] if started else []), pause, Delta(0, "y", 1, finish_reason="stop")]
    server = await start(engine)
    _, writer = await _post(server, {**BODY, "stream": stream})
    await pause.reached.wait()
    assert engine.num_open == 1
    writer.transport.abort()
    async with asyncio.timeout(30):
        await engine.all_closed()
    assert not pause.go_on.is_set()


async def test_a_client_that_leaves_closes_the_generators_of_all_its_prompts(start: Start, engine: ScriptedEngine) -> None:
    pauses = {1: Pause(), 2: Pause()}
    engine.script = lambda request: [Delta(0, "x", 1), pauses[len(request.token_ids)]]
    server = await start(engine)
    _, writer = await _post(server, {"model": MODEL, "prompt": [[1], [1, 2]], "stream": True}, "/v1/completions")
    for pause in pauses.values():
        await pause.reached.wait()
    writer.transport.abort()
    async with asyncio.timeout(30):
        await engine.all_closed(2)


async def test_a_client_that_does_not_read_holds_the_engine_back(start: Start, engine: ScriptedEngine) -> None:
    text = "x" * 100_000
    engine.script = lambda request: [Delta(0, text, 1)] * 1000
    server = await start(engine)
    _, writer = await _post(server, STREAMED)
    before = -1
    while engine.num_deltas > before or not engine.num_open:
        before = engine.num_deltas
        for _ in range(1000):  # turns of the loop, in which the server could go on
            await asyncio.sleep(0)
    assert 0 < engine.num_deltas < 1000
    writer.transport.abort()
    async with asyncio.timeout(30):
        await engine.all_closed()


# --- starting and stopping ------------------------------------------------------------------------------------------


async def test_draining_refuses_what_is_new_and_finishes_what_runs(
    start: Start, session: aiohttp.ClientSession, engine: ScriptedEngine
) -> None:
    pause = Pause()
    engine.script = lambda request: [Delta(0, "x", 1), pause, Delta(0, "y", 1, finish_reason="stop")]
    server = await start(engine)
    async with session.post(server.url + CHAT, json=STREAMED) as running:
        await pause.reached.wait()
        draining = asyncio.create_task(server.drain(30))
        assert await server.drain(0) is False
        async with session.post(server.url + CHAT, json=BODY) as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"]
            assert (await error_of(refused))["code"] == "unavailable"
        async with session.get(server.url + "/ready") as ready:
            assert (ready.status, (await ready.json())["reason"]) == (503, "draining")
        async with session.get(server.url + "/health") as health:
            assert health.status == 200
        assert not draining.done()
        pause.go_on.set()
        assert (await running.read()).endswith(b"data: [DONE]\n\n")
        assert await draining is True


async def test_stopping_closes_what_still_runs(start: Start, engine: ScriptedEngine) -> None:
    pause = Pause()
    engine.script = lambda request: [pause]
    server = await start(engine)
    _, writer = await _post(server, BODY)
    await pause.reached.wait()
    await server.stop()
    assert engine.num_open == 0
    writer.close()


async def test_a_port_that_is_taken_is_named(start: Start, engine: ScriptedEngine) -> None:
    server = await start(engine)
    port = int(server.url.rpartition(":")[2])
    second = HttpServer(http_config(port=port), engine, prompter(), request_timeout_s=60.0)
    with pytest.raises(BadConfig, match=f"cannot listen on 127.0.0.1:{port}"):
        await second.start()
