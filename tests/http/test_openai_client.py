"""The official client against the server: what it sends is taken, and what it gets it understands."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from epd.errors import DeadlineExceeded, Overloaded, PeerLost
from epd.request import Delta, GenerateRequest, TextLogprob
from tests.http.conftest import Start
from tests.support.engine import MODEL, ScriptedEngine, Step
from tests.support.text import png, tokenizer

HI: list[Any] = [{"role": "user", "content": "hi"}]
WHOLE = "Hello, wörld!"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def client(engine: ScriptedEngine, start: Start) -> AsyncIterator[openai.AsyncOpenAI]:
    server = await start(engine)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def test_a_chat(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HI, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.message.content for choice in answer.choices} == {WHOLE}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.last.token_ids)
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint
    assert answer.created > 1_600_000_000


async def test_a_streamed_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WHOLE
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_streamed_chat_of_several_choices_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts = ["", "", ""]
    ends = ["", "", ""]
    usages = []
    async for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [WHOLE] * 3
    assert ends == ["stop"] * 3
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] is not None
    assert usages[-1].completion_tokens == 12
    assert usages[-1].prompt_tokens_details is not None
    assert usages[-1].prompt_tokens_details.cached_tokens == 4


async def test_images_reach_the_engine_in_order(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    files = [png(64, 64), png(32, 128, "blue")]
    content: list[Any] = [{"type": "text", "text": "compare"}]
    content += [{"type": "image_url", "image_url": {"url": data_url(data), "detail": "auto"}} for data in files]
    await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert [image.data for image in engine.last.images] == files
    assert engine.last.images[1].item.offset > engine.last.images[0].item.offset


async def test_completions_of_every_kind_of_prompt(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    plain = await client.completions.create(model=MODEL, prompt="Once upon", max_tokens=7)
    assert plain.choices[0].text == WHOLE
    assert plain.object == "text_completion"
    assert engine.last.token_ids == tuple(tokenizer().encode("Once upon"))
    assert engine.last.sampling.max_tokens == 7
    await client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert engine.last.token_ids == (5, 6, 7)
    assert engine.last.sampling.max_tokens == 16
    several = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices] == [WHOLE] * 4
    assert several.usage is not None
    assert several.usage.prompt_tokens == 2
    assert several.usage.completion_tokens == 16
    assert several.usage.prompt_tokens_details is not None
    assert several.usage.prompt_tokens_details.cached_tokens == 8
    await client.completions.create(model=MODEL, prompt=[[1], [2, 3]])
    assert {request.token_ids for request in engine.requests[-2:]} == {(1,), (2, 3)}
    assert len({request.request_id for request in engine.requests}) == len(engine.requests)


async def test_streamed_completions_of_several_prompts(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    texts = [""] * 4
    last = None
    async for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [WHOLE] * 4
    assert last is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == 16


async def test_every_parameter_arrives(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        max_completion_tokens=20,
        max_tokens=20,
        stop=["a", "b", "a"],
        n=2,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": 3, "5": -100},
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        extra_body={
            "top_k": 20,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    request = engine.last
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 20, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.5, 1.1)
    assert (sampling.seed, sampling.max_tokens, sampling.num_logprobs) == (2**63 - 1, 20, 3)
    assert sampling.logit_bias == ((5, -100.0), (7, 3.0))
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, ())
    assert (request.stop, request.n, request.deadline_s) == (("a", "b"), 2, 60.0)
    assert "be brief" in tokenizer().decode(request.token_ids)
    assert tokenizer().decode(request.token_ids).endswith("<think>\n\n</think>\n\n")


async def test_defaults(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI)
    first = engine.last
    await client.chat.completions.create(model=MODEL, messages=HI)
    assert first.sampling.max_tokens == 4096 - len(first.token_ids)
    assert first.sampling.stop_token_ids == (tokenizer().special_ids["<|im_end|>"], tokenizer().special_ids["<|endoftext|>"])
    assert first.sampling.seed != engine.last.sampling.seed
    assert (first.sampling.temperature, first.sampling.top_k, first.sampling.num_logprobs) == (1.0, 0, -1)


async def test_prompts_of_one_request_draw_alike_only_with_a_seed(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    await client.completions.create(model=MODEL, prompt=["a", "a"])
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed
    await client.completions.create(model=MODEL, prompt=["a", "a"], seed=3)
    assert [request.sampling.seed for request in engine.requests[2:]] == [3, 3]


# --- log probabilities ----------------------------------------------------------------------------------------------


def with_logprobs(request: GenerateRequest) -> list[Step]:
    first = TextLogprob(1, "Hi", b"Hi", -0.5, ((1, "Hi", b"Hi", -0.5), (2, "Ho", b"Ho", -1.5)))
    second = TextLogprob(3, "�", b"\xc3", float("-inf"), ((4, "x", b"x", -0.1), (3, "�", b"\xc3", float("-inf"))))
    return [Delta(0, "Hi", 1, (first,)), Delta(0, "é", 1, (second,), "length")]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_chat(client: openai.AsyncOpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.script = with_logprobs
    content: list[Any] = []
    if stream:
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=2, stream=True
        ):
            if (logprobs := chunk.choices[0].logprobs) is not None:
                content += logprobs.content or []
    else:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    assert [(item.token, item.bytes, item.logprob) for item in content] == [("Hi", [72, 105], -0.5), ("�", [0xC3], -9999.0)]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("Hi", -0.5), ("Ho", -1.5)]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_completion(client: openai.AsyncOpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.script = with_logprobs
    found: list[Any] = []
    if stream:
        async for chunk in await client.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True):
            found.append(chunk.choices[0].logprobs)
    else:
        found.append((await client.completions.create(model=MODEL, prompt="x", logprobs=2)).choices[0].logprobs)
    assert [token for item in found for token in item.tokens] == ["Hi", "�"]
    assert [offset for item in found for offset in item.text_offset] == [0, 2]
    assert [value for item in found for value in item.token_logprobs] == [-0.5, -9999.0]
    assert found[0].top_logprobs[0] == {"Hi": -0.5, "Ho": -1.5}


async def test_logprobs_zero_reports_only_the_chosen_tokens(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = with_logprobs
    logprobs = (await client.completions.create(model=MODEL, prompt="x", logprobs=0)).choices[0].logprobs
    assert logprobs is not None
    assert engine.last.sampling.num_logprobs == 0
    assert logprobs.tokens == ["Hi", "�"]
    assert logprobs.top_logprobs is None


# --- errors ---------------------------------------------------------------------------------------------------------


async def test_errors_become_the_clients_exceptions(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="other", messages=HI)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=MODEL, messages=HI, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    assert "from 0 to 2, not 3" in wrong.value.message
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a b " * 5000}])
    assert long.value.code == "context_length_exceeded"
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_text_has_its_own_status(
    client: openai.AsyncOpenAI, engine: ScriptedEngine, stream: bool
) -> None:
    engine.script = lambda request: [Overloaded("too many requests", retry_after_s=2.5)]
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    assert caught.value.response.headers["Retry-After"] == "3"
    assert caught.value.code == "overloaded"
    engine.script = lambda request: [DeadlineExceeded("too slow")]
    with pytest.raises(openai.InternalServerError) as late:
        await client.completions.create(model=MODEL, prompt="x", stream=stream)
    assert late.value.status_code == 504


async def test_an_error_within_a_stream_is_raised_by_the_client(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta(0, "Hel", 1), PeerLost("the decode worker is gone")]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="the decode worker is gone"):  # noqa: PT012  (the text before it counts)
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
    assert "".join(filter(None, texts)) == "Hel"


async def test_one_failing_prompt_fails_all(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [PeerLost("gone")] if len(request.token_ids) == 1 else [Delta(0, "x", 1)] * 1000
    with pytest.raises(openai.InternalServerError, match="gone"):
        await client.completions.create(model=MODEL, prompt=[[1], [2, 3]])
    assert engine.num_open == 0


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "epd"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")
