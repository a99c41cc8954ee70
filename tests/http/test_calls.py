"""The official client and answers that think and call: whole, streamed, and sent back with the results."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest

from epd.gateway.prompt import Prompter
from epd.gateway.template import ChatTemplate
from epd.gateway.tools import written
from epd.request import Delta, GenerateRequest, TextLogprob
from tests.http.conftest import Start
from tests.support.engine import MODEL, ScriptedEngine, Step
from tests.support.text import CHAT_TEMPLATE, model_config, tokenizer

HI: list[Any] = [{"role": "user", "content": "hi"}]


class Weather(pydantic.BaseModel):
    city: str


class Clock(pydantic.BaseModel):
    zone: int = 0


LOOSE: Any = {"type": "function", "function": {"name": "Weather", "parameters": Weather.model_json_schema()}}
TOOLS: list[Any] = [LOOSE, {"type": "function", "function": {"name": "Clock", "parameters": Clock.model_json_schema()}}]
PARIS, TIME = written("Weather", {"city": "Paris"}), written("Clock", {"zone": 1})


class Says:
    """An engine's script: every choice says `text`, a few letters at a time."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason = "stop"

    def __call__(self, request: GenerateRequest) -> list[Step]:
        steps: list[Step] = []
        for index in range(request.n):
            cut = [self.text[start : start + 3] for start in range(0, len(self.text), 3)]
            wants = request.sampling.num_logprobs >= 0
            logprobs = (TextLogprob(1, "x", b"x", -0.5),) if wants else ()
            steps += [Delta(index, piece, 1, logprobs) for piece in cut]
            steps.append(Delta(index, "", 1, finish_reason=self.finish_reason))
        return steps


@pytest.fixture
def says() -> Says:
    return Says()


@pytest.fixture
def engine(says: Says) -> ScriptedEngine:
    return ScriptedEngine(says)


@pytest.fixture
async def client(engine: ScriptedEngine, start: Start) -> AsyncIterator[openai.AsyncOpenAI]:
    server = await start(engine)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def whole(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    answer = await client.chat.completions.create(**{"model": MODEL, "messages": HI, "tools": TOOLS, **fields})
    return answer.choices[0]


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """The answer as the client's own helper puts it together."""
    async with client.chat.completions.stream(**{"model": MODEL, "messages": HI, "tools": TOOLS, **fields}) as stream:
        async for _ in stream:
            pass
        return (await stream.get_final_completion()).choices[0]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I will look.\n{PARIS}", "I will look.", [("Weather", {"city": "Paris"})]),
        (f"{PARIS}\n{TIME}", None, [("Weather", {"city": "Paris"}), ("Clock", {"zone": 1})]),
    ],
)
async def test_calls_arrive_whole_and_streamed(
    client: openai.AsyncOpenAI, says: Says, text: str, content: str | None, calls: list[tuple[str, Any]]
) -> None:
    says.text = text
    ids = set()
    for choice in (await whole(client), await streamed(client)):
        message = choice.message
        assert (choice.finish_reason, message.role, message.content or None) == ("tool_calls", "assistant", content)
        made = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
        assert made == calls
        assert {call.type for call in message.tool_calls} == {"function"}
        ids |= {call.id for call in message.tool_calls}
    assert len(ids) == 2 * len(calls)
    assert all(name.startswith("call_") for name in ids)


async def test_arguments_stream_as_they_are_written(client: openai.AsyncOpenAI, says: Says) -> None:
    says.text = f"I will look.\n{PARIS}"
    chunks = [chunk async for chunk in await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    named = [part for part in parts if part.id]
    assert [(part.index, part.type, part.function and part.function.name) for part in named] == [(0, "function", "Weather")]
    arguments = [part.function.arguments for part in parts if part.function and part.function.arguments]
    assert len(arguments) > 3
    assert "".join(arguments) == '{"city": "Paris"}'
    assert "".join(delta.content or "" for delta in deltas) == "I will look."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


async def test_without_a_call_nothing_is_different(client: openai.AsyncOpenAI, says: Says) -> None:
    says.text = "No, <b>thanks</b>.\n"
    for choice in (await whole(client), await streamed(client)):
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", says.text, None)


async def test_an_answer_that_is_cut_off_says_so(client: openai.AsyncOpenAI, says: Says) -> None:
    says.text, says.finish_reason = PARIS[: PARIS.index('": "Paris')], "length"
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        await streamed(client)
    cut: Any = caught.value.completion.choices[0]
    for choice in (await whole(client), cut):
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"city'


async def test_every_choice_has_its_own_calls_and_log_probabilities(client: openai.AsyncOpenAI, says: Says) -> None:
    says.text = PARIS
    answer = await client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, n=2, logprobs=True)
    for choice in answer.choices:
        assert choice.message.tool_calls is not None
        assert len(choice.message.tool_calls) == 1
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or []) == -(-len(PARIS) // 3)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=HI, tools=TOOLS, n=2, logprobs=True, stream=True
        )
    ]
    for index in range(2):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert sum(len(choice.logprobs.content or []) for choice in choices if choice.logprobs) == -(-len(PARIS) // 3)
        assert sum(bool(part.id) for choice in choices for part in choice.delta.tool_calls or []) == 1


async def test_calls_and_their_results_can_be_sent_back(client: openai.AsyncOpenAI, engine: ScriptedEngine, says: Says) -> None:
    says.text = f"<think>\nhm\n</think>\n\nI will look.\n{PARIS}"
    message = (await whole(client)).message
    assert message.reasoning_content == "hm"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    for said in (message.model_dump(), message.model_dump(exclude_none=True), message):
        await whole(client, messages=[*HI, said, result])
        prompt = tokenizer().decode(engine.last.token_ids)
        assert f"I will look.\n{PARIS}\nuser\n<tool_response>\nsunny\n</tool_response>" in prompt


async def test_what_is_asked_of_calls_reaches_the_sampler(client: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    async def guide(**fields: Any) -> str:
        await whole(client, **fields)
        return engine.last.sampling.guide

    assert await guide() == await guide(tool_choice="none") == ""
    guides = [
        await guide(tool_choice="required"),
        await guide(tool_choice={"type": "function", "function": {"name": "Clock"}}),
        await guide(parallel_tool_calls=False),
        await guide(response_format={"type": "json_object"}),
        await guide(tools=[openai.pydantic_function_tool(Weather)]),
    ]
    assert all(guides)
    assert len(set(guides)) == 5


async def test_with_tool_choice_none_the_model_hears_of_no_tools(
    client: openai.AsyncOpenAI, engine: ScriptedEngine, says: Says
) -> None:
    says.text = PARIS
    choice = await whole(client, tool_choice="none")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (PARIS, None, "stop")
    assert "Weather" not in tokenizer().decode(engine.last.token_ids)
    await whole(client)
    assert "Weather" in tokenizer().decode(engine.last.token_ids)


async def test_parsed_tools_are_parsed(client: openai.AsyncOpenAI, says: Says) -> None:
    says.text = PARIS
    tools = [openai.pydantic_function_tool(Weather)]
    answer = await client.chat.completions.parse(model=MODEL, messages=HI, tools=tools)
    message: Any = answer.choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Paris")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    says.text = '{"city": "Rome"}'
    again = await client.chat.completions.parse(
        model=MODEL, messages=[*HI, message, result], tools=tools, response_format=Weather
    )
    assert again.choices[0].message.parsed == Weather(city="Rome")
    parsed = {"role": "assistant", "content": again.choices[0].message.content, "parsed": {"city": "Rome"}}
    assert await whole(client, messages=[*HI, parsed, *HI])


# --- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [TOOLS, openai.omit])
async def test_thoughts_are_apart_from_what_is_said(client: openai.AsyncOpenAI, says: Says, tools: Any) -> None:
    says.text = "<think>\nWhat now?\n</think>\n\nHello."
    choice = await whole(client, tools=tools)
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == ("What now?", "Hello.", "stop")
    chunks = [chunk async for chunk in await client.chat.completions.create(model=MODEL, messages=HI, tools=tools, stream=True)]
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "What now?"
    assert "".join(delta.content or "" for delta in deltas) == "Hello."


async def test_a_guided_answer_comes_after_thoughts(start: Start, says: Says, engine: ScriptedEngine) -> None:
    """Where the template has the model begin with them; where it is told not to think, at once."""
    template = ChatTemplate(CHAT_TEMPLATE + "{{ '<think>\\n' if enable_thinking is not defined or enable_thinking }}")
    made = Prompter(tokenizer=tokenizer(), template=template, config=model_config(), max_model_len=lambda: 4096)
    server = await start(engine, made=made)
    says.text = 'Let me see.\n</think>\n\n{"a": 1}'
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        form: Any = {"response_format": {"type": "json_object"}, "tools": openai.omit}
        choice = await whole(client, **form)
        assert (choice.message.reasoning_content, choice.message.content) == ("Let me see.", '{"a": 1}')
        assert "</think>" in engine.last.sampling.guide
        says.text = '{"a": 1}'
        choice = await whole(client, **form, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert choice.message.content == '{"a": 1}'
        assert not hasattr(choice.message, "reasoning_content")
        assert "</think>" not in engine.last.sampling.guide
