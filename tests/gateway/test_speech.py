from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.gateway.speech import Said, Speech, Thinking
from epd.gateway.tools import CLOSING, OPENING, written

PARIS = written("weather", {"city": "Paris"})
NOW = written("now", {})


def heard(pieces: Sequence[str], *, thinking: Thinking = Thinking.NONE, can_call: bool = True) -> tuple[Said, Speech]:
    """Everything that the pieces hold; of each call the first part has the name, and no other has."""
    speech = Speech(thinking=thinking, can_call=can_call)
    whole = Said()
    for index, piece in enumerate(pieces, 1):
        said = speech.feed(piece, is_last=index == len(pieces))
        whole.thoughts += said.thoughts
        whole.content += said.content
        whole.calls += said.calls
    return whole, speech


def calls_of(said: Said) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in said.calls:
        if part.name:
            assert part.index == len(found)
            found.append((part.name, part.arguments))
        else:
            assert part.index == len(found) - 1
            name, arguments = found[-1]
            found[-1] = (name, arguments + part.arguments)
    return found


TEXTS = [
    ("", "", []),
    ("hello", "hello", []),
    ("a < b and <b>c</b>\n\n", "a < b and <b>c</b>\n\n", []),
    (PARIS, "", [("weather", '{"city": "Paris"}')]),
    (f"Let me see.\n{PARIS}", "Let me see.", [("weather", '{"city": "Paris"}')]),
    (f"{PARIS}\n{NOW}\n", "", [("weather", '{"city": "Paris"}'), ("now", "{}")]),
    (f"one\n{NOW}\ntwo", "one\ntwo", [("now", "{}")]),
    # Arguments pass as they were written, whatever is in their strings.
    (
        f'{OPENING}{{"name":"f","arguments":{{"a" : "}} \\" {OPENING} {{", "b":[{{}}, 1e3]}}}}{CLOSING}',
        "",
        [("f", f'{{"a" : "}} \\" {OPENING} {{", "b":[{{}}, 1e3]}}')],
    ),
    # Fields that come in another order, or spell the arguments out.
    (f'{OPENING}\n{{"arguments": {{"é": 1}}, "name": "f"}}\n{CLOSING}', "", [("f", '{"é": 1}')]),
    (f'{OPENING}{{"name": "f", "arguments": "{{\\"a\\": 1}}"}}{CLOSING}', "", [("f", '{"a": 1}')]),
    (f'{OPENING}{{"name": "f"}}{CLOSING}', "", [("f", "{}")]),
    # Braces too many or too few, and tags that are missing.
    (f'{OPENING}{{"name": "f", "arguments": {{}}}}}}\n{CLOSING}!', "!", [("f", "{}")]),
    (f'{OPENING}{{"name": "f", "arguments": {{}}{CLOSING}!', "!", [("f", "{}")]),
    (f'{OPENING}{{"name": "f", "arguments": {{"a": 1{CLOSING}!', "!", [("f", '{"a": 1')]),
    (f'{OPENING}{{"name": "f", "arguments": {{}}}}', "", [("f", "{}")]),
    (f'{OPENING}{{"name": "f", "arguments": {{}}}}\nand so', "\nand so", [("f", "{}")]),
    (f'{OPENING}{{"name": "f", "arguments": {{"a": "x', "", [("f", '{"a": "x')]),
    # What begins like a call and is none.
    (f"{OPENING}nothing{CLOSING} more", f"{OPENING}nothing{CLOSING} more", []),
    (f"{OPENING}[1]{CLOSING}", f"{OPENING}[1]{CLOSING}", []),
    (f'{OPENING}{{"name": "", "arguments": {{}}}}{CLOSING}', f'{OPENING}{{"name": "", "arguments": {{}}}}{CLOSING}', []),
    (f'x{OPENING}{{"name": "f", "argu', f'x{OPENING}{{"name": "f", "argu', []),
    ("<tool_ca", "<tool_ca", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), TEXTS)
def test_calls_and_what_is_around_them(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text), [text[:7], text[7:], ""]):
        said, speech = heard(pieces)
        assert (said.content, calls_of(said), said.thoughts) == (content, calls, "")
        assert speech.num_calls == len(calls)


@pytest.mark.parametrize(
    ("thinking", "text", "thoughts", "content"),
    [
        (Thinking.NONE, "<think>x</think>y", "", "<think>x</think>y"),
        (Thinking.POSSIBLE, "y", "", "y"),
        (Thinking.POSSIBLE, "<think>\nx\n</think>\n\ny\n", "x", "y\n"),
        (Thinking.POSSIBLE, "\n<think>x</think>y", "x", "y"),
        (Thinking.POSSIBLE, "<think>\n\n</think>\n\n", "", ""),
        (Thinking.POSSIBLE, "<thinking", "", "<thinking"),
        (Thinking.POSSIBLE, "so: <think>x</think>", "", "so: <think>x</think>"),
        (Thinking.BEGUN, "\nx < y\n\nz\n</think>\n\n", "x < y\n\nz", ""),
        (Thinking.BEGUN, "x</think>y</think>z", "x", "y</think>z"),
        (Thinking.BEGUN, "cut off </thi", "cut off </thi", ""),
    ],
)
def test_thoughts_come_first_if_at_all(thinking: Thinking, text: str, thoughts: str, content: str) -> None:
    for pieces in ([text], list(text)):
        said, _ = heard(pieces, thinking=thinking, can_call=False)
        assert (said.thoughts, said.content) == (thoughts, content)


def test_a_call_in_thoughts_is_none() -> None:
    said, speech = heard([f"shall I {NOW}?</think>\n\n{PARIS}"], thinking=Thinking.BEGUN)
    assert said.thoughts == f"shall I {NOW}?"
    assert [name for name, _ in calls_of(said)] == ["weather"]
    assert speech.num_calls == 1


def test_without_tools_a_call_is_text() -> None:
    said, speech = heard(list(PARIS), can_call=False)
    assert (said.content, said.calls, speech.num_calls) == (PARIS, [], 0)


def test_everything_passes_as_soon_as_it_is_clear_what_it_is() -> None:
    speech = Speech(thinking=Thinking.POSSIBLE, can_call=True)

    def said(text: str) -> tuple[str, str, list[tuple[str, str]]]:
        found = speech.feed(text, is_last=False)
        return found.thoughts, found.content, [(part.name, part.arguments) for part in found.calls]

    assert said("<think>so") == ("so", "", [])
    assert said(" what</th") == (" what", "", [])
    assert said("ink>\n\nAh") == ("", "Ah", [])
    assert said(", a < b <t") == ("", ", a < b", [])
    assert said("ea> \n") == ("", " <tea>", [])
    assert said('<tool_call>\n{"name": "f", "argum') == ("", "", [])
    assert said('ents": {"a') == ("", "", [("f", ""), ("", '{"a')])
    assert said('": "b') == ("", "", [("", '": "b')])
    assert said('"}}\n</tool') == ("", "", [("", '"}')])
    assert said("_call>\n") == ("", "", [])


pieces = st.lists(
    st.sampled_from([PARIS, NOW, OPENING, CLOSING, "<think>", "</think>", "\n", " ", "}", "{", '"', "x", "ö", '{"name": "f"'])
    | st.text(max_size=3),
    max_size=8,
).map("".join)


@given(pieces, st.sampled_from(Thinking), st.booleans(), st.data())
def test_it_does_not_matter_how_a_text_is_cut(text: str, thinking: Thinking, can_call: bool, data: st.DataObject) -> None:
    whole, _ = heard([text], thinking=thinking, can_call=can_call)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    said, _ = heard(parts, thinking=thinking, can_call=can_call)
    assert (said.thoughts, said.content, calls_of(said)) == (whole.thoughts, whole.content, calls_of(whole))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True), st.dictionaries(st.text(), values)), max_size=3)
)
def test_calls_that_are_written_are_read(calls: list[tuple[str, dict[str, object]]]) -> None:
    said, _ = heard(["\n".join(written(name, arguments) for name, arguments in calls)])
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(said)] == calls
    assert said.content == ""


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<|im_start|>assistant\n", Thinking.POSSIBLE),
        ("<|im_start|>assistant\n<think>\n", Thinking.BEGUN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Thinking.NONE),
    ],
)
def test_a_prompt_says_whether_there_will_be_thoughts(prompt: str, thinking: Thinking) -> None:
    assert Thinking.after(prompt) is thinking
