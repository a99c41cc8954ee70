from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.http.chunks import ChatFormat, Choice, CompletionFormat, Format, Identity, Usage
from epd.request import Delta, TextLogprob
from epd.timeline import TimelineSpan

IDENTITY = Identity('id"\\', 17, 'mo"del', "fp")


def forms(include_usage: bool) -> list[Format]:
    return [
        ChatFormat(IDENTITY, include_usage=include_usage, wants_logprobs=True),
        CompletionFormat(IDENTITY, include_usage=include_usage, num_logprobs=1),
    ]


def events(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n\n")
    lines = data.split(b"\n\n")[:-1]
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


deltas = st.builds(
    Delta,
    index=st.integers(0, 3),
    text=st.text(max_size=20),
    num_tokens=st.integers(1, 3),
    logprobs=st.lists(st.just(TextLogprob(1, '"', b'"', -0.5)), max_size=2).map(tuple),
    finish_reason=st.sampled_from(["", "stop", "length"]),
)


@given(st.lists(deltas, min_size=1, max_size=4), st.booleans())
def test_every_event_is_json_that_says_what_the_delta_says(several: list[Delta], include_usage: bool) -> None:
    for form in forms(include_usage):
        for delta in several:
            (event,) = events(form.delta(delta))
            assert (event["id"], event["created"], event["model"], event["system_fingerprint"]) == ('id"\\', 17, 'mo"del', "fp")
            assert ("usage" in event) is include_usage
            (choice,) = event["choices"]
            assert choice["index"] == delta.index
            assert (choice["finish_reason"] or "") == delta.finish_reason
            assert (choice["logprobs"] is not None) is bool(delta.logprobs)
            shown = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            assert shown == delta.text


def test_lines_of_text_do_not_become_lines_of_the_stream() -> None:
    for form in forms(False):
        data = form.delta(Delta(0, "a\n\ndata: b\r\n\u2028", 1))
        assert data.count(b"\n") == 2
        assert b"\r" not in data


def test_the_opening_of_a_chat_has_a_role_for_each_choice() -> None:
    chat, completion = forms(False)
    assert [event["choices"][0]["delta"] for event in events(chat.opening(2))] == [{"role": "assistant", "content": ""}] * 2
    assert completion.opening(2) == b""


def test_usage_is_an_event_without_choices() -> None:
    usage = Usage(10, num_choices=2)
    usage.add(Delta(0, "", 3, num_cached_tokens=8))
    usage.add(Delta(1, "", 2, num_cached_tokens=10))
    for form in forms(True):
        (event,) = events(form.usage(usage))
        assert event["choices"] == []
        assert event["usage"] == {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 8},
        }


def test_a_timeline_is_an_event_without_choices_and_a_field_of_a_whole_answer() -> None:
    spans = [TimelineSpan("prefill", "prefill", "p0", 0.5, 1.0)]
    shown = {"spans": [{"name": "prefill", "stage": "prefill", "worker": "p0", "start_s": 0.5, "end_s": 1.0}]}
    for form in forms(True):
        (event,) = events(form.timeline(spans))
        assert (event["choices"], event["epd"]) == ([], shown)
        assert json.loads(form.whole([Choice()], Usage(1), spans))["epd"] == shown
        assert "epd" not in json.loads(form.whole([Choice()], Usage(1)))


@pytest.mark.parametrize("wanted", [False, True])
def test_a_whole_answer_has_logprobs_if_they_were_wanted(wanted: bool) -> None:
    choice = Choice()
    choice.add(Delta(0, "a", 1))
    choice.add(Delta(0, "b", 1, finish_reason="stop"))
    both: list[Format] = [
        ChatFormat(IDENTITY, include_usage=False, wants_logprobs=wanted),
        CompletionFormat(IDENTITY, include_usage=False, num_logprobs=0 if wanted else -1),
    ]
    for form in both:
        (shown,) = json.loads(form.whole([choice], Usage(1)))["choices"]
        assert (shown["logprobs"] is not None) is wanted
        assert shown["finish_reason"] == "stop"
        assert (shown.get("text") or shown["message"]["content"]) == "ab"
