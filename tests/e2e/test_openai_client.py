"""The official client, unchanged, against a cluster of processes."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from PIL import Image, ImageDraw

from tests.support.cluster import MODEL_NAME, ProcessCluster


@pytest.fixture
def client(cluster: ProcessCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
    cluster.wait_until_idle()


def _picture(colour: str, form: str = "PNG") -> dict[str, Any]:
    """A disc at the top left."""
    image = Image.new("RGB", (64, 64), (245, 245, 245))
    ImageDraw.Draw(image).ellipse((6, 6, 26, 26), fill=colour)
    data = io.BytesIO()
    image.save(data, form)
    url = f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _ask(*parts: dict[str, Any] | str) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def _count(client: openai.OpenAI, **options: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": _ask("Count from 7 to 12."), "temperature": 0, **options}
    return client.chat.completions.create(**asked)


def test_an_answer_at_once_and_the_same_streamed(client: openai.OpenAI) -> None:
    whole = _count(client)
    assert whole.choices[0].message.content == "7 8 9 10 11 12"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(_count(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_is_seen(client: openai.OpenAI, form: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=_ask(_picture("red", form), "What is in this image?"), temperature=0
    )
    assert answer.choices[0].message.content == "a red circle at the top left."


def test_two_images_are_told_apart(client: openai.OpenAI) -> None:
    messages = _ask(_picture("red"), _picture("blue"), "What is in each image?")
    answer = client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0)
    content = answer.choices[0].message.content or ""
    assert content.index("red") < content.index("blue")


def test_a_prompt_that_was_there_before_is_cached(client: openai.OpenAI) -> None:
    messages = _ask("Count from 30 to 60. " * 8)
    cold = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=2)
    warm = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=2)
    assert cold.usage is not None
    assert warm.usage is not None
    assert warm.usage.prompt_tokens_details is not None
    num_cached = warm.usage.prompt_tokens_details.cached_tokens
    assert num_cached is not None
    assert num_cached >= warm.usage.prompt_tokens // 16 * 16 - 16 > 0


def test_choices_a_seed_and_what_they_repeat(client: openai.OpenAI) -> None:
    options = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 12}
    first = [choice.message.content for choice in _count(client, **options).choices]
    again = [choice.message.content for choice in _count(client, **options).choices]
    assert first == again
    assert len(first) == 3


def test_log_probabilities(client: openai.OpenAI) -> None:
    content = _count(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "7 8 9 10 11 12"
    for entry in content:
        best = entry.top_logprobs[0]
        assert len(entry.top_logprobs) == 3
        assert entry.token == best.token  # greedy
        assert entry.logprob == pytest.approx(best.logprob)
        assert -1.0 < entry.logprob <= 0.0


def test_where_an_answer_ends(client: openai.OpenAI) -> None:
    stopped = _count(client, stop=["10"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("7 8 9 ", "stop")
    cut = _count(client, max_completion_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    long = _count(client, max_tokens=40, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 40


def test_a_bias_and_penalties_change_what_is_drawn(client: openai.OpenAI) -> None:
    plain = _count(client, logprobs=True, max_tokens=4)
    biased = _count(client, logprobs=True, max_tokens=4, logit_bias={"40": 100})
    tokens = [entry.token for entry in biased.choices[0].logprobs.content]
    assert len(set(tokens)) == 1
    assert tokens != [entry.token for entry in plain.choices[0].logprobs.content]
    endless = {"ignore_eos": True}
    free = _count(client, max_tokens=40, extra_body=endless)
    varied = _count(client, max_tokens=40, extra_body={**endless, "repetition_penalty": 1.9})
    assert varied.choices[0].message.content != free.choices[0].message.content


class Shape(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    corner: Literal["top left", "bottom right"]


def test_an_answer_in_the_form_of_a_class(client: openai.OpenAI) -> None:
    for colour in ("red", "blue"):
        messages = _ask(_picture(colour), "What is in this image?")
        answer = client.chat.completions.parse(model=MODEL_NAME, messages=messages, temperature=0, response_format=Shape)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.parsed is not None


def test_a_form_is_kept_to_while_it_streams(client: openai.OpenAI) -> None:
    chunks = _count(
        client,
        stream=True,
        temperature=1.5,
        seed=3,
        n=2,
        max_tokens=300,
        extra_body={"structured_outputs": {"regex": "[0-9]{3}(, [0-9]{3}){4}"}},
    )
    said = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said[0] != said[1]
    for text in said.values():
        assert re.fullmatch(r"\d{3}(, \d{3}){4}", text)
    (choice,) = _count(client, temperature=1.0, response_format={"type": "json_object"}, max_tokens=400, seed=4).choices
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


class Move(pydantic.BaseModel):
    """Moves a piece."""

    colour: Literal["red", "blue"]
    steps: Literal[1, 2, 3]


def _call(client: openai.OpenAI, messages: list[Any], **fields: Any) -> Any:
    tools = [openai.pydantic_function_tool(Move)]
    return client.chat.completions.parse(model=MODEL_NAME, messages=messages, tools=tools, temperature=0, **fields).choices[0]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Move"}}])
def test_a_function_is_called_and_the_result_answered(client: openai.OpenAI, choice: Any) -> None:
    """By a model that has never learned to: what it may write makes it."""
    messages = _ask(_picture("red"), "What is in this image?")
    asked = _call(client, messages, tool_choice=choice, parallel_tool_calls=False)
    (call,) = asked.message.tool_calls
    assert asked.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Move)
    assert asked.message.content is None
    result = {"role": "tool", "tool_call_id": call.id, "content": "moved"}
    answered = _call(client, [*messages, asked.message, result])
    assert answered.finish_reason in ("stop", "tool_calls")
    assert answered.message.content


def test_a_call_that_streams_is_the_one_that_comes_whole(client: openai.OpenAI) -> None:
    messages = _ask(_picture("blue"), "What is in this image?")
    fields: Any = {
        "tools": [openai.pydantic_function_tool(Move)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
    }
    whole = client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=1.2, seed=5, **fields)
    said = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=MODEL_NAME, messages=messages, temperature=1.2, seed=5, stream=True, **fields
    ):
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                assert part.function is not None
                said[choice.index] += part.function.arguments or ""
    calls = [choice.message.tool_calls for choice in whole.choices]
    assert [call[0].function.arguments for call in calls if call and call[0].type == "function"] == list(said.values())


def test_raw_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt=["1 2 3", "5 6"], max_tokens=3, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = list(client.completions.create(model=MODEL_NAME, prompt="1 2 3", max_tokens=3, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL_NAME
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        _count(client, temperature=9)
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.function\.name"):
        _count(client, tools=[{"type": "function", "function": {"name": "no name", "parameters": {}}}])


async def test_a_client_that_leaves_frees_everything(cluster: ProcessCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Count from 1 to 120."}],
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        await stream.close()
    cluster.wait_until_idle()
