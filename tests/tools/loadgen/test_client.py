from __future__ import annotations

import asyncio
import random
import socket

import pytest

from tests.tools.loadgen.scripted import (
    DONE,
    Cut,
    Hang,
    ScriptedServer,
    Send,
    Status,
    Step,
    VirtualClock,
    answer,
    event,
    finish,
    piece,
    usage,
)
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import Run
from tools.loadgen.stats import e2e_s, itls_s, summarise, tpot_s, ttft_s
from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest

REQUEST = LoadRequest(index=0, body=b'{"stream": true}', num_images=2)


async def ask_all(scripts: list[list[Step]], request: LoadRequest = REQUEST, *, timeout_s: float = 30.0) -> list[Record]:
    clock = VirtualClock()
    async with ScriptedServer(clock, scripts).running() as server, open_session() as session:
        client = Client(session, server.url, timeout_s=timeout_s, clock=clock)
        return [await client.ask(request) for _ in scripts]


async def test_times_of_an_answer_are_those_of_the_script() -> None:
    (record,) = await ask_all([answer([0.5, 0.1, 0.02, 0.3])])
    assert record.outcome == "ok"
    assert (record.input_tokens, record.output_tokens, record.num_images) == (5, 4, 2)
    assert record.text == "w0 w1 w2 w3 "
    assert ttft_s(record) == pytest.approx(0.5, abs=1e-9)
    assert itls_s(record) == pytest.approx([0.1, 0.02, 0.3], abs=1e-9)
    assert e2e_s(record) == pytest.approx(0.92, abs=1e-9)
    assert tpot_s(record) == pytest.approx(0.14, abs=1e-9)


async def test_percentiles_over_many_answers_are_those_of_the_scripts() -> None:
    rng = random.Random(7)
    delays_s = [[rng.uniform(0.001, 0.2) for _ in range(rng.randint(2, 9))] for _ in range(40)]
    summary = summarise(Run(0.0, 2000.0, records=await ask_all([answer(delays) for delays in delays_s])))
    assert summary.num_ok == 40
    assert summary.output_tokens_per_s == pytest.approx(sum(map(len, delays_s)) / 2000.0)
    for measured, known in (
        (summary.ttft, [delays[0] for delays in delays_s]),
        (summary.itl, [gap for delays in delays_s for gap in delays[1:]]),
        (summary.tpot, [sum(delays[1:]) / (len(delays) - 1) for delays in delays_s]),
        (summary.e2e, [sum(delays) for delays in delays_s]),
    ):
        assert measured.count == len(known)
        assert measured.mean_s == pytest.approx(sum(known) / len(known), abs=1e-9)
        assert measured.max_s == pytest.approx(max(known), abs=1e-9)
        for percent, value in ((50, measured.p50_s), (90, measured.p90_s), (95, measured.p95_s), (99, measured.p99_s)):
            assert value == pytest.approx(interpolated(known, percent), abs=1e-9), percent


async def test_latencies_count_from_the_due_time() -> None:
    clock = VirtualClock()
    async with ScriptedServer(clock, [answer([0.5, 0.1])]).running() as server, open_session() as session:
        due_s = clock.now_s - 2.0
        record = await Client(session, server.url, timeout_s=30.0, clock=clock).ask(REQUEST, due_s)
    assert ttft_s(record) == pytest.approx(2.5)
    assert e2e_s(record) == pytest.approx(2.6)
    assert record.sent_s - record.scheduled_s == pytest.approx(2.0)


OVERLOADED = '{"error": {"message": "too many", "code": "overloaded"}}'
FAILURES: dict[str, tuple[list[Step], str, str, str]] = {
    "refused": ([Status(429, OVERLOADED)], "refused", "429 overloaded", "too many"),
    "refused in few words": ([Status(429, "go away", "text/plain")], "refused", "429", "go away"),
    "server error": ([Status(500, "oops", "text/plain")], "failed", "500", "oops"),
    "unavailable": ([Status(503, OVERLOADED)], "failed", "503 overloaded", "too many"),
    "bad request": ([Status(400, '{"error": {"message": "no such", "type": "invalid"}}')], "failed", "400 invalid", "no such"),
    "odd error": ([Status(400, '{"error": "odd"}')], "failed", "400", "odd"),
    "not a stream": ([Status(200, "{}")], "failed", "bad_content_type", "application/json"),
    "cut before output": ([Send(b": hello\n\n"), Cut()], "failed", "truncated", ""),
    "cut in the middle": ([Send(piece("a")), Send(piece("b")), Cut()], "failed", "truncated", ""),
    "ends early and politely": ([Send(piece("a"))], "failed", "truncated", "after 1 pieces"),
    "no output": ([Send(finish() + DONE)], "failed", "empty", ""),
    "no JSON": ([Send(piece("a")), Send(event("nonsense"))], "failed", "bad_event", "nonsense"),
    "no object": ([Send(event("[1, 2]"))], "failed", "bad_event", "[1, 2]"),
    "wrong shape": ([Send(event({"choices": ["x"]}))], "failed", "bad_event", "chunk"),
    "error in the stream": ([Send(piece("a")), Send(event({"error": {"message": "lost"}}))], "failed", "error_event", "lost"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failures_are_told_apart(name: str) -> None:
    script, outcome, reason, detail = FAILURES[name]
    (record,) = await ask_all([script])
    assert (record.outcome, record.reason) == (outcome, reason)
    assert detail in record.detail
    assert record.end_s >= record.sent_s


async def test_an_answer_without_done_is_whole_and_ends_with_the_body() -> None:
    (record,) = await ask_all([[Send(piece("a")), Send(finish(), after_s=0.5)]])
    assert (record.outcome, record.text) == ("ok", "a")
    assert e2e_s(record) == pytest.approx(0.5)


async def test_what_came_before_the_end_is_kept() -> None:
    (record,) = await ask_all([[Send(piece("a")), Send(piece("b"), after_s=0.5), Cut()]])
    assert (record.text, record.output_tokens) == ("ab", 2)


async def test_a_silent_server_is_a_timeout() -> None:
    (record,) = await ask_all([[Send(piece("a")), Hang()]], timeout_s=0.2)
    assert (record.outcome, record.reason) == ("failed", "timeout")
    assert len(record.piece_times_s) == 1


async def test_no_server_is_a_connection_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can listen there
        async with open_session() as session:
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
            record = await Client(session, url, timeout_s=30.0, clock=VirtualClock()).ask(REQUEST)
    assert (record.outcome, record.reason) == ("failed", "connection")
    assert record.http_status == 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (LoadRequest(index=0, body=b"{}", expect_tokens=2), ""),
        (LoadRequest(index=0, body=b"{}", expect_tokens=3), "wrong_length"),
        (LoadRequest(index=0, body=b"{}", expect_text="w0 w1"), ""),
        (LoadRequest(index=0, body=b"{}", expect_text="w0 w2"), "wrong_text"),
    ],
)
async def test_wrong_answers_are_failures(request_: LoadRequest, reason: str) -> None:
    (record,) = await ask_all([answer([0.1, 0.1])], request_)
    assert (record.outcome, record.reason) == ("failed" if reason else "ok", reason)


async def test_an_answer_without_usage_is_counted_by_pieces() -> None:
    (record,) = await ask_all([[Send(piece("a")), Send(piece("b")), Send(finish()), Send(DONE)]])
    assert record.outcome == "ok"
    assert not record.has_usage
    assert record.output_tokens == 2


async def test_cached_tokens_are_read() -> None:
    (record,) = await ask_all([[Send(piece("a")), Send(finish() + usage(9, 1, cached_tokens=8) + DONE)]])
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (9, 8, 1)


async def test_a_run_that_is_over_waits_for_nobody() -> None:
    clock = VirtualClock()
    async with ScriptedServer(clock, [[Send(piece("a")), Hang()]]).running() as server, open_session() as session:
        client = Client(session, server.url, timeout_s=30.0, clock=clock)
        reads = clock.reads
        running = asyncio.create_task(client.ask(REQUEST))
        await clock.wait_for_read(reads + 1)  # sent, and a piece was read
        client.cut_off()
        record = await running
        assert (record.outcome, record.reason, record.output_tokens) == ("failed", "unfinished", 1)
        assert (await client.ask(REQUEST)).reason == "unfinished", "nothing begins any more"
        client.reopen()
        assert (await asyncio.wait_for(_ask_and_leave(client), 5)) == "timeout"


async def _ask_and_leave(client: Client) -> str:
    client._timeout_s = 0.1
    return (await client.ask(REQUEST)).reason


@pytest.mark.parametrize(("share", "asked"), [(0.0, 0), (0.3, 3), (1.0, 10)])
async def test_so_many_ask_for_the_servers_timeline(share: float, asked: int) -> None:
    clock = VirtualClock()
    async with ScriptedServer(clock, [answer([0.1])]).running() as server, open_session() as session:
        client = Client(session, server.url, timeout_s=30.0, clock=clock, timeline_share=share)
        for _ in range(10):
            await client.ask(REQUEST)
    assert sum(headers.get("x-epd-timeline") == "1" for headers in server.headers) == asked


async def test_the_key_and_the_body_are_sent() -> None:
    clock = VirtualClock()
    async with ScriptedServer(clock, [answer([0.1])]).running() as server, open_session("secret") as session:
        client = Client(session, server.url + "/", timeout_s=30.0, clock=clock)
        assert await client.first_model() == "scripted"
        await client.ask(REQUEST)
    assert server.bodies == [{"stream": True}]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def interpolated(values: list[float], percent: float) -> float:
    """The textbook definition, written independently of NumPy."""
    values = sorted(values)
    place = (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
