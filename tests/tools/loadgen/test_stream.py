from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.loadgen.scripted import DONE, event, finish, piece, usage
from tools.loadgen.stream import AnswerStream, BadStream, Record


def record() -> Record:
    return Record(index=0, scheduled_s=0.0, sent_s=0.0)


def read(data: bytes, *, sizes: list[int] | None = None) -> Record:
    found = record()
    stream = AnswerStream(found)
    start = 0
    for size in [*(sizes or []), len(data)]:
        stream.feed(data[start : start + size], now_s=1.0)
        start += size
    stream.close()
    return found


@given(st.lists(st.integers(min_value=1, max_value=30), max_size=40))
def test_any_split_of_the_bytes_reads_the_same(sizes: list[int]) -> None:
    body = b": comment\r\n\r\n" + piece("grün") + piece(" ") + piece('"') + finish("stop") + usage(3, 3, 1) + DONE
    found = read(body, sizes=sizes)
    assert (found.text, found.finish_reason, len(found.piece_times_s)) == ('grün "', "stop", 3)
    assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (3, 3, 1)


def chunk(text: str, *, compact: bool, ascii_only: bool, created: int = 5, logprobs: object = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
    body = {"id": "x", "created": created, "choices": [choice], "usage": None}
    separators = (",", ":") if compact else (", ", ": ")
    return b"data: " + json.dumps(body, ensure_ascii=ascii_only, separators=separators).encode() + b"\n\n"


@given(st.lists(st.text(max_size=8), max_size=8), st.booleans(), st.booleans(), st.integers(1, 3))
def test_text_is_what_was_sent_however_it_is_framed(texts: list[str], compact: bool, ascii_only: bool, every: int) -> None:
    pieces = [
        chunk(
            text,
            compact=compact,
            ascii_only=ascii_only,
            created=number // every,
            logprobs={"content": text} if every == 3 else None,
        )
        for number, text in enumerate(texts)
    ]
    found = read(b"".join([piece("0"), *pieces, finish(), DONE]))
    assert found.text == "0" + "".join(texts)
    assert len(found.piece_times_s) == 1 + sum(bool(text) for text in texts)


@pytest.mark.parametrize(
    "late",
    [
        {"content": "b", "extra": "c"},
        {"content": "b", "content2": ""},
        {"content": 'b","x":"'},
        {"content": '"'},
        {"content": "b\\"},
    ],
)
def test_what_only_looks_like_the_frame_is_read_in_full(late: dict[str, str]) -> None:
    first = event({"choices": [{"delta": {"content": "a"}}]})
    found = read(first + event({"choices": [{"delta": late}]}) + finish() + DONE)
    assert found.text == "a" + late["content"]
    assert len(found.piece_times_s) == 2


def test_several_choices_and_thinking_are_output() -> None:
    both = event({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]})
    thought = event({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]})
    found = read(thought + both + finish() + DONE)
    assert found.text == "hmab"
    assert len(found.piece_times_s) == 3


def test_text_and_end_in_one_event() -> None:
    found = read(piece("a") + event({"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]}) + DONE)
    assert (found.text, found.finish_reason) == ("ab", "stop")


def test_text_is_not_kept_for_nobody() -> None:
    found = record()
    stream = AnswerStream(found, keeps_text=False)
    stream.feed(piece("a") + piece("b") + finish() + DONE, 1.0)
    stream.close()
    assert (found.text, found.output_tokens) == ("", 2)


def test_a_piece_counts_when_its_last_byte_is_there() -> None:
    found = record()
    stream = AnswerStream(found)
    first, second = piece("a"), piece("b")
    stream.feed(first + second[:5], now_s=1.0)
    stream.feed(second[5:], now_s=2.0)
    assert list(found.piece_times_s) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (piece("") + finish() + DONE, "empty"),
        (piece("a") + DONE, "truncated"),
        (piece("a") + event("x"), "bad_event"),
        (event({"error": {"message": "no", "code": "overloaded"}}), "error_event overloaded"),
        (event({"error": "no"}), "error_event"),
        (piece("a") + piece("b").replace(b'"b"', b'"\\x"') + finish() + DONE, "bad_event"),
    ],
)
def test_bad_streams(data: bytes, reason: str) -> None:
    with pytest.raises(BadStream) as caught:
        read(data)
    assert caught.value.reason == reason


def test_the_finish_reason_ends_an_answer() -> None:
    assert read(piece("a") + finish()).text == "a"


def test_a_last_line_without_an_end_counts() -> None:
    assert read((piece("a") + finish() + DONE).rstrip()).text == "a"


def test_the_servers_timeline_is_kept() -> None:
    spans = [{"name": "prefill", "stage": "prefill", "worker": "p0", "start_s": 0.0, "end_s": 0.5}]
    assert read(piece("a") + finish() + event({"choices": [], "epd": {"spans": spans}}) + DONE).spans == spans
