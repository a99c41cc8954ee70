from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.loadgen.scripted import DONE, finish, piece, usage
from tools.loadgen.stream import AnswerStream, BadStream, Record


def record() -> Record:
    return Record(index=0, scheduled_s=0.0, sent_s=0.0)


@given(st.lists(st.integers(min_value=1, max_value=30), max_size=40))
def test_any_split_of_the_bytes_reads_the_same(sizes: list[int]) -> None:
    body = b": comment\r\n\r\n" + piece("grün") + piece(" ") + finish("stop") + usage(3, 2, 1) + DONE
    read = record()
    stream = AnswerStream(read)
    start = 0
    for size in [*sizes, len(body)]:
        stream.feed(body[start : start + size], now_s=1.0)
        start += size
    stream.close()
    assert stream.is_done
    assert (read.text, read.finish_reason, len(read.piece_times_s)) == ("grün ", "stop", 2)
    assert (read.input_tokens, read.output_tokens, read.cached_tokens) == (3, 2, 1)


def test_a_piece_counts_when_its_last_byte_is_there() -> None:
    read = record()
    stream = AnswerStream(read)
    first, second = piece("a"), piece("b")
    stream.feed(first + second[:5], now_s=1.0)
    stream.feed(second[5:], now_s=2.0)
    assert read.piece_times_s == [1.0, 2.0]


def test_an_empty_piece_is_no_output() -> None:
    read = record()
    stream = AnswerStream(read)
    stream.feed(piece(""), now_s=1.0)
    assert read.piece_times_s == []
    stream.feed(finish(), now_s=1.0)
    with pytest.raises(BadStream) as caught:
        stream.close()
    assert caught.value.reason == "empty"
