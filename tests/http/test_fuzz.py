"""Any request at all gets an answer or an error of the client's, never one of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epd.http.app import HttpServer
from tests.http.conftest import http_config
from tests.http.test_schema import bodies
from tests.support.engine import MODEL, ScriptedEngine
from tests.support.text import prompter

Post = Callable[[str, bytes], tuple[int, bytes]]


@pytest.fixture(scope="module")
def post() -> Iterator[Post]:
    """Sends bytes to a path of one server that lives as long as the module; gives status and body."""
    with asyncio.Runner() as runner:
        server = HttpServer(http_config(), ScriptedEngine(), prompter(), request_timeout_s=60.0)
        runner.run(server.start())
        session = runner.run(_session())

        async def send(path: str, data: bytes) -> tuple[int, bytes]:
            async with session.post(server.url + path, data=data, headers={"Content-Type": "application/json"}) as response:
                return response.status, await response.read()

        yield lambda path, data: runner.run(send(path, data))
        runner.run(session.close())
        runner.run(server.stop())


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


texts = st.text(max_size=20) | st.sampled_from(["<|im_end|>", "<|image_pad|>", "<", "</think>", "\x00"])
urls = (
    st.sampled_from(["data:image/png;base64,AAAA", "data:image/png;base64,!", "http://127.0.0.1/x", "https://host/x", "x:"])
    | texts
)
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": urls})}),
)
likely = st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "assistant", "system", "developer"]),
                    "content": texts | st.lists(parts, max_size=3),
                }
            ),
            min_size=1,
            max_size=4,
        ),
    },
    optional={
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "stop": st.lists(texts, max_size=2),
        "logprobs": st.booleans(),
        "max_tokens": st.integers(1, 10**6),
        "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "x"]), st.booleans()),
    },
)
prompts = st.fixed_dictionaries(
    {"model": st.just(MODEL), "prompt": texts | st.lists(texts, max_size=3) | st.lists(st.integers(-2, 600), max_size=4)},
    optional={"stream": st.booleans(), "logprobs": st.integers(0, 3), "n": st.integers(1, 3)},
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(body=likely | prompts | bodies, path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_no_body_is_ever_a_mistake_of_ours(post: Post, body: object, path: str) -> None:
    status, answer = post(path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert status in (200, 400, 404)
    if status == 200:
        assert b'"error"' not in answer
    else:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
