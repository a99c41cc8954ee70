from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.errors import BadRequest
from epd.gateway.guide import Guide
from epd.http.errors import error_body
from epd.http.fields import Fields
from epd.http.messages import Limits
from epd.http.routes import parse_json
from epd.http.schema import parse_chat, parse_completion

ROOT = Path(__file__).parents[2]
LIMITS = Limits(vocab_size=1000, max_images=2, max_choices=256)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def message(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


def part(**fields: Any) -> dict[str, Any]:
    return message(content=[fields])


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **fields}


# (field with a bad value, the parameter that is named, words of the message)
BAD_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 3}, "model", "must be a string, not 3"),
    ({"model": None}, "model", "required"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2, not -0.1"),
    ({"temperature": "hot"}, "temperature", 'not "hot"'),
    ({"temperature": True}, "temperature", "not true"),
    ({"temperature": 10**400}, "temperature", "more than 64 bits"),
    ({"top_p": 0}, "top_p", "above 0, up to 1"),
    ({"top_p": 1.01}, "top_p", "not 1.01"),
    ({"top_k": -2}, "top_k", "an integer from -1"),
    ({"top_k": 1.5}, "top_k", "an integer"),
    ({"min_p": 2}, "min_p", "from 0 to 1"),
    ({"seed": 2**63}, "seed", "an integer from"),
    ({"seed": "1"}, "seed", "an integer from"),
    ({"max_tokens": 0}, "max_tokens", "an integer from 1"),
    ({"max_tokens": 2**31}, "max_tokens", "an integer from 1"),
    ({"max_tokens": [1]}, "max_tokens", "not an array"),
    ({"stop": ""}, "stop", "1 to 1024 characters"),
    ({"stop": ["x"] * 17}, "stop", "up to 16"),
    ({"stop": [1]}, "stop", "a string or an array"),
    ({"stop": "x" * 1025}, "stop", "1 to 1024 characters"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": 129}, "n", "from 1 to 128"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty", "from 0.01 to 10"),
    ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    ({"logit_bias": {"1000": 1}}, "logit_bias", "not a token id from 0 to 999"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"1": True}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "up to 1024"),
    ({"ignore_eos": 1}, "ignore_eos", "true or false, not 1"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": True}, "stream_options", "must be a JSON object, not a boolean"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "beyond false"),
    ({"user": 3}, "user", "must be a string"),
    ({"metadata": {"a": 1}}, "metadata", "object of strings"),
    ({"service_tier": "flex"}, "service_tier", 'beyond "auto" or "default"'),
    ({"store": True}, "store", "beyond false"),
    ({"guided_json": {}}, "guided_json", "not supported"),
    ({"min_tokens": 3}, "min_tokens", "not supported beyond 0"),
    ({"no such thing": 1}, "no such thing", "not supported"),
    ({"x" * 1000: 1}, "x" * 60 + "...", "not supported"),
]
BAD_CHATS: list[tuple[object, str, str]] = [
    ([], "", "must be a JSON object, not an array"),
    ("hi", "", "must be a JSON object, not a string"),
    ({"model": "m"}, "messages", "required"),
    (chat(messages=[]), "messages", "non-empty"),
    (chat(messages={}), "messages", "non-empty array"),
    (chat(messages=["hi"]), "messages[0]", "must be a JSON object, not a string"),
    (message(role=None), "messages[0].role", "required"),
    (message(role="robot"), "messages[0].role", 'not "robot"'),
    (message(role=["user"]), "messages[0].role", "not an array"),
    (message(role="tool"), "messages[0].tool_call_id", "required"),
    (message(role="tool", tool_call_id="1"), "messages[0].tool_call_id", 'is "1", which is no call'),
    (message(role="tool", tool_call_id=["1"]), "messages[0].tool_call_id", "is an array, which is no call"),
    (message(role="function"), "messages[0].role", "results of calls"),
    (message(content=None), "messages[0].content", "required"),
    (message(content=3), "messages[0].content", "not a number"),
    (message(content=[]), "messages[0].content", "non-empty"),
    (message(content=[{}] * 10_001), "messages[0].content", "10001 parts; at most 10000"),
    (chat(messages=[{}] * 10_001), "messages", "10001 messages; at most 10000"),
    (chat(structured_outputs={"json": '{"a":' * 101 + "1" + "}" * 101}), "structured_outputs.json", "more than 100 levels"),
    (chat(structured_outputs={"json": "[" * 20_000}), "structured_outputs.json", "nested too deeply"),
    (message(name="bob"), "messages[0].name", "not supported"),
    (message(role="assistant", content=None), "messages[0].content", "required"),
    (message(role="assistant", tool_calls={}), "messages[0].tool_calls", "must be an array"),
    (message(role="assistant", tool_calls=[{}]), "messages[0].tool_calls[0].id", "required"),
    (message(role="assistant", tool_calls=[{"id": "1"}]), "messages[0].tool_calls[0].function", "required"),
    (message(role="assistant", tool_calls=[{"id": "1", "type": "custom"}]), "messages[0].tool_calls[0].type", '"function"'),
    (
        message(role="assistant", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}]),
        "messages[0].tool_calls[0].function.arguments",
        "must be a string",
    ),
    (message(role="assistant", reasoning_content=3), "messages[0].reasoning_content", "must be a string"),
    (message(tool_calls=[]), "messages[0].tool_calls", "not supported"),
    (message(role="assistant", refusal="no"), "messages[0].refusal", "not supported"),
    (part(), "messages[0].content[0].type", '"text" or "image_url", not null'),
    (part(type="text"), "messages[0].content[0].text", "required"),
    (part(type="text", text=3), "messages[0].content[0].text", "must be a string"),
    (part(type="text", text="x", cache_control={}), "messages[0].content[0].cache_control", "not supported"),
    (part(type="input_audio", input_audio={}), "messages[0].content[0].type", "input_audio"),
    (part(type="video_url", video_url={}), "messages[0].content[0].type", "video_url"),
    (part(type="image_url"), "messages[0].content[0].image_url", "required"),
    (part(type="image_url", image_url="http://x"), "messages[0].content[0].image_url", "must be a JSON object"),
    (part(type="image_url", image_url={}), "messages[0].content[0].image_url.url", "required"),
    (part(type="image_url", image_url={"url": 1}), "messages[0].content[0].image_url.url", "must be a string"),
    (
        part(type="image_url", image_url={"url": "x", "detail": "low"}),
        "messages[0].content[0].image_url.detail",
        '"auto" or "high"',
    ),
    (message(role="system", content=[IMAGE]), "messages[0].content[0].type", "only messages of users and tools"),
    (message(content=[IMAGE] * 3), "messages", "3 images; at most 2"),
    (chat(top_logprobs=1), "top_logprobs", "needs logprobs"),
    (chat(logprobs=3), "logprobs", "true or false"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "send one of them"),
    (
        chat(ignore_eos=True, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required"),
        "ignore_eos",
        "false",
    ),
    (chat(functions=[{"name": "f"}]), "functions", "not supported beyond []"),
    (chat(response_format="json"), "response_format", "must be a JSON object"),
    (chat(response_format={}), "response_format.type", "required"),
    (chat(response_format={"type": "yaml"}), "response_format.type", '"json_object" or "json_schema"'),
    (chat(response_format={"type": "json_object", "schema": {}}), "response_format.schema", "not supported"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "required"),
    (chat(response_format=json_schema(name="n")), "response_format.json_schema.schema", "required"),
    (chat(response_format=json_schema(schema=[])), "response_format.json_schema.schema", "must be an object"),
    (chat(response_format=json_schema(schema={}, strict="yes")), "response_format.json_schema.strict", "true or false"),
    (chat(response_format=json_schema(schema={}, examples=[])), "response_format.json_schema.examples", "not supported"),
    (chat(structured_outputs={}), "structured_outputs", "one of json, regex, choice"),
    (chat(structured_outputs={"regex": "a", "choice": ["a"]}), "structured_outputs", "one of json, regex, choice"),
    (chat(structured_outputs={"grammar": "a"}), "structured_outputs.grammar", "not supported"),
    (chat(structured_outputs={"regex": ""}), "structured_outputs.regex", "a regular expression"),
    (chat(structured_outputs={"json": "{"}), "structured_outputs.json", "no JSON"),
    (chat(structured_outputs={"json": 3}), "structured_outputs.json", "must be an object"),
    (chat(structured_outputs={"choice": []}), "structured_outputs.choice", "non-empty"),
    (chat(structured_outputs={"choice": ["a", 1]}), "structured_outputs.choice", "strings"),
    (chat(structured_outputs={"regex": "a"}, ignore_eos=True), "ignore_eos", "must be false"),
    (chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}), "structured_outputs.regex", "both"),
    (chat(reasoning_effort="low"), "reasoning_effort", "not supported"),
    (chat(verbosity="high"), "verbosity", "not supported"),
    (chat(modalities=["text", "audio"]), "modalities", "not supported"),
    (chat(audio={}), "audio", "not supported"),
    (chat(prediction={}), "prediction", "not supported"),
    (chat(web_search_options={}), "web_search_options", "not supported"),
    (chat(functions=[{}]), "functions", "not supported"),
    (chat(chat_template_kwargs=[]), "chat_template_kwargs", "switches"),
    (chat(chat_template_kwargs={"a": "text"}), "chat_template_kwargs", "switches"),
    (chat(prompt="x"), "prompt", "not supported"),
]
BAD_COMPLETIONS: list[tuple[object, str, str]] = [
    (None, "", "must be a JSON object, not null"),
    ({"model": "m"}, "prompt", "required"),
    (completion(prompt=3), "prompt", "must be a string"),
    (completion(prompt=[]), "prompt", "non-empty"),
    (completion(prompt=[[]]), "prompt", "non-empty"),
    (completion(prompt=["a", 1]), "prompt", "array of these"),
    (completion(prompt=[True]), "prompt", "array of these"),
    (completion(prompt=[-1]), "prompt", "array of these"),
    (completion(prompt=[10**40]), "prompt", "array of these"),
    (completion(prompt=["a"] * 129), "prompt", "129 prompts; at most 128"),
    (completion(prompt=["a"] * 3, n=50), "n", "more than 128 choices"),
    (completion(logprobs=True), "logprobs", "an integer from 0 to 20"),
    (completion(best_of=2), "best_of", "beyond the value of n"),
    (completion(echo=True), "echo", "not supported"),
    (completion(suffix="x"), "suffix", "not supported"),
    (completion(max_completion_tokens=1), "max_completion_tokens", "not supported"),
    (completion(messages=[]), "messages", "not supported"),
]


def refused(parse: Any, body: object) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(body, LIMITS)
    return caught.value


@pytest.mark.parametrize(("fields", "param", "words"), BAD_OPTIONS)
def test_bad_options_are_named_and_explained(fields: dict[str, Any], param: str, words: str) -> None:
    for error in (refused(parse_chat, chat(**fields)), refused(parse_completion, completion(**fields))):
        assert error.param == param
        assert words in error.message
        assert len(error.message) < 400


@pytest.mark.parametrize(("body", "param", "words"), BAD_CHATS)
def test_bad_chats_are_named_and_explained(body: object, param: str, words: str) -> None:
    error = refused(parse_chat, body)
    assert (error.param, words in error.message) == (param, True), error.message


@pytest.mark.parametrize(("body", "param", "words"), BAD_COMPLETIONS)
def test_bad_completions_are_named_and_explained(body: object, param: str, words: str) -> None:
    error = refused(parse_completion, body)
    assert (error.param, words in error.message) == (param, True), error.message


def test_a_text_model_refuses_images_where_they_stand() -> None:
    with pytest.raises(BadRequest, match="takes no images") as caught:
        parse_chat(message(content=[IMAGE]), Limits(vocab_size=10, max_images=4, max_choices=8, takes_images=False))
    assert caught.value.param == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto"},
        {"verbosity": "medium", "logit_bias": {}, "stop": [], "stop_token_ids": [], "n": 1, "length_penalty": 1},
        {"user": "u", "metadata": {"k": "v"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"audio": None, "web_search_options": None, "unheard_of": None, "temperature": None, "stream_options": None},
        {"logprobs": False, "top_logprobs": 0, "max_tokens": 5, "max_completion_tokens": 5, "top_k": -1},
    ],
)
def test_what_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    call, plain = parse_chat(chat(**fields), LIMITS), parse_chat(chat(), LIMITS)
    assert call.messages == plain.messages
    assert (call.options.sampling.top_k, call.options.stop) == (0, ())


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guide("schema", '{"type": "object"}', "response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "null"}, "strict": True},
                }
            },
            Guide("schema", '{"type": "null"}', "response_format.json_schema.schema"),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, Guide("schema", '{"type": "null"}', "structured_outputs.json")),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, Guide("schema", '{"type": "null"}', "structured_outputs.json")),
        ({"structured_outputs": {"regex": "a+"}}, Guide("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Guide("choice", '["a", "b"]', "structured_outputs.choice")),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            Guide("regex", "a", "structured_outputs.regex"),
        ),
    ],
)
def test_what_an_output_is_to_look_like(fields: dict[str, Any], guide: Guide | None) -> None:
    assert parse_chat(chat(**fields), LIMITS).options.guide == guide
    assert parse_completion({"model": "m", "prompt": "p", **fields}, LIMITS).options.guide == guide


def test_an_answer_can_be_sent_back_as_the_client_got_it() -> None:
    nothing: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    echoed = {"role": "assistant", "content": "x", **nothing}
    call = parse_chat(chat(messages=[{"role": "user", "content": "hi"}, echoed]), LIMITS)
    assert call.messages[1] == {"role": "assistant", "content": "x"}


def test_calls_and_their_results_reach_the_template() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": [1, "two"]}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{broken"}},
        {"id": "c3", "type": "function", "function": {"name": "look", "arguments": ""}},
        {"id": "c4", "type": "function", "function": {"name": "look", "arguments": '{"a":' * 200 + "1" + "}" * 200}},
    ]
    asked = {"role": "assistant", "content": None, "reasoning_content": "hm", "refusal": None, "tool_calls": calls}
    results = [
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "seen:"}, IMAGE]},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "nothing"},
    ]
    call = parse_chat(chat(messages=[{"role": "user", "content": "hi"}, asked, *results]), LIMITS)
    _, said, first, second = call.messages
    assert (said["role"], said["content"], said["reasoning_content"]) == ("assistant", "", "hm")
    arguments = [made["function"]["arguments"] for made in said["tool_calls"]]  # type: ignore[attr-defined]
    assert arguments[:3] == [{"at": [1, "two"]}, "{broken", {}]
    assert arguments[3] == calls[3]["function"]["arguments"]  # type: ignore[index]  # too deep to be walked through
    assert first == {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "seen:"}, {"type": "image"}]}
    assert second == {"role": "tool", "tool_call_id": "c1", "content": "nothing", "name": "look"}
    assert [image.param for image in call.images] == ["messages[2].content[1].image_url.url"]


def test_a_result_is_of_the_last_calls() -> None:
    def asked(call_id: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": "f", "arguments": "{}"}}]}

    result = {"role": "tool", "tool_call_id": "old", "content": "x"}
    assert parse_chat(chat(messages=[asked("old"), result, asked("new")]), LIMITS)
    with pytest.raises(BadRequest, match='"old", which is no call'):
        parse_chat(chat(messages=[asked("old"), asked("new"), result]), LIMITS)


def test_prompts_that_would_never_all_be_let_in_are_refused_at_once() -> None:
    few = Limits(vocab_size=1000, max_images=2, max_choices=3)
    body = {"model": "m", "prompt": ["a", "b"], "n": 2}
    with pytest.raises(BadRequest, match="more than 3 choices"):
        parse_completion(body, few)
    assert parse_completion(body, LIMITS)
    assert parse_completion({**body, "prompt": "a", "n": 8}, few)  # alone, it is let in


def test_a_body_with_far_too_many_values_is_not_even_read() -> None:
    with pytest.raises(BadRequest, match="more than 1000000 values"):
        parse_json(b"[" + b"[]," * 1_000_000 + b"[]]")
    assert parse_json(b'{"image": "' + b"A" * 2_000_000 + b'"}')


def test_the_documented_fields_are_those_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[str] = set()
    original = Fields.take

    def take(fields: Fields, name: str) -> object:
        if not fields.path(""):
            taken.add(name)
        return original(fields, name)

    monkeypatch.setattr(Fields, "take", take)
    parse_chat(chat(), LIMITS)
    section = (ROOT / "docs" / "api.md").read_text().partition("## Chat")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([a-z_]+)[`.]", row)}
    to_no_effect = {"model", "user", "safety_identifier", "prompt_cache_key", "metadata", "stream"}
    assert documented == taken - to_no_effect


def test_images_keep_their_order_and_know_where_they_stand() -> None:
    other = {"type": "image_url", "image_url": {"url": "https://host/x.png"}}
    call = parse_chat(message(content=[IMAGE, {"type": "text", "text": "and"}, other]), LIMITS)
    assert [image.url for image in call.images] == [IMAGE["image_url"]["url"], "https://host/x.png"]  # type: ignore[index]
    assert call.images[1].param == "messages[0].content[2].image_url.url"
    assert call.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]


# --- anything at all ------------------------------------------------------------------------------------------------

NAMES = [
    *("model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens"),
    *("stop", "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("ignore_eos", "stream", "stream_options", "include_usage", "tools", "response_format", "role", "content", "type", "text"),
    *("structured_outputs", "json", "regex", "choice", "json_schema", "schema", "strict", "tool_choice", "parallel_tool_calls"),
    *("function", "name", "parameters", "arguments", "description", "tool_calls", "tool_call_id", "reasoning_content", "id"),
    *("image_url", "url", "detail", "user", "metadata", "chat_template_kwargs", "best_of", "echo", "suffix", "store"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 2**64, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        [
            "user",
            "assistant",
            "system",
            "tool",
            "function",
            "required",
            "text",
            "image_url",
            "high",
            "data:image/png;base64,AA==",
            "m",
        ]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | values, "content": values},
        optional=dict.fromkeys(("name", "tool_calls", "tool_call_id", "x"), values),
    ),
    max_size=3,
)
bodies = st.one_of(
    values,
    st.fixed_dictionaries(
        {"model": st.just("m") | values},
        optional={"messages": messages | values, **{name: values for name in NAMES if name not in ("model", "messages")}},
    ),
)


@settings(max_examples=200)
@given(bodies)
def test_any_json_is_served_or_refused_in_the_apis_words(body: object) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            parse(body, LIMITS)
        except BadRequest as error:
            described = json.loads(error_body(error))["error"]
            assert set(described) == {"message", "type", "param", "code"}
            assert described["type"] == "invalid_request_error"


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | bodies.map(lambda body: json.dumps(body).encode()[:-1]))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'"\xff"',
        b'"\\ud800"',
        b"NaN",
        b"1e999",
        b"{}{}",
        b"\xff\xfe{}",
        b"{'a': 1}",
    ],
)
def test_malformed_json_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest, match="the request body is"):
        parse_json(data)
