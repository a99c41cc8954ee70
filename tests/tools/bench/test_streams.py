from __future__ import annotations

import asyncio
import json

import pytest

from tools.bench.flood import Flood, serve
from tools.bench.rows import meets_bar
from tools.bench.streams import rows
from tools.loadgen.client import Client, open_session
from tools.loadgen.load import Run
from tools.loadgen.stream import Record
from tools.loadgen.workload import LoadRequest


async def test_the_flood_speaks_the_protocol() -> None:
    server, running = await serve(Flood(rate=200.0, num_tokens=5), port=0)
    try:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with open_session() as session:
            client = Client(session, url, timeout_s=30.0, clock=asyncio.get_running_loop().time)
            assert await client.first_model() == "flood"
            request = LoadRequest(0, json.dumps({"stream": True}).encode())
            records = await asyncio.gather(*(client.ask(request) for _ in range(8)))
            again = await client.ask(request)
            async with session.post(f"{url}/chat/completions", json={}) as response:
                await response.content.readline()
                response.close()  # leaves in the middle
            records.append(await client.ask(request))
        for record in [*records, again]:
            assert (record.outcome, record.output_tokens, record.text) == ("ok", 5, " token" * 5)
    finally:
        running.cancel()
        server.close()
        await asyncio.gather(running, return_exceptions=True)


def streams(num: int, *, lag_s: float = 0.001, outcome: str = "ok") -> Run:
    times_s = [0.1 * number for number in range(1, 101)]
    records = [
        Record(index, 0.0, 0.0, piece_times_s=times_s, end_s=times_s[-1], outcome=outcome, output_tokens=100, has_usage=True)
        for index in range(num)
    ]
    return Run(0.0, 10.0, records=records, cpu_s=0.02, loop_lags_s=[lag_s] * 10)


def test_the_rows() -> None:
    found = {row["name"].partition(": ")[2]: row for row in rows(10, streams(10))}
    assert found["read"]["value"] == pytest.approx(100, rel=0.02)
    assert found["CPU per token"]["value"] == pytest.approx(20.0)
    assert [meets_bar(row) for row in found.values()] == [True, None, None, True]
    assert meets_bar(rows(10, streams(10, lag_s=0.02))[3]) is False
    assert meets_bar(rows(20, streams(10))[0]) is False
    with pytest.raises(RuntimeError, match="10 of 10"):
        rows(10, streams(10, outcome="failed"))
