from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.gateway.detokenize import Detokenizer, Piece
from epd.request import GenerateRequest
from epd.tokenizer import Tokenizer
from protocol.messages import RequestId, Sampling, Token, TokenLogprob
from tests.support.text import LANGUAGES, raw_tokenizer, tokenizer
from tests.test_tokenizer import byte_fallback

END = tokenizer().special_ids["<|im_end|>"]
NUM_IDS = raw_tokenizer().get_vocab_size() + 8

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=2).map("".join),
    st.text(alphabet="ab.👍🏽é\n", max_size=30),
)
stop_strings = st.lists(st.text(alphabet="ab.👍🏽é \n", min_size=1, max_size=4), max_size=4)


def request(stop: Sequence[str] = (), *, num_logprobs: int = -1, stop_token_ids: tuple[int, ...] = (END,)) -> GenerateRequest:
    sampling = Sampling(num_logprobs=num_logprobs, stop_token_ids=stop_token_ids)
    return GenerateRequest(RequestId("r"), (1,), (), sampling, stop=tuple(stop))


def run(token_ids: Sequence[int], stop: Sequence[str] = (), *, end: str = "length") -> list[Piece]:
    """The pieces of an output whose last token carries the finish reason, fed until one of them is the last."""
    detokenizer = Detokenizer(tokenizer(), request(stop))
    pieces = []
    for place, token_id in enumerate(token_ids):
        piece = detokenizer.feed(Token(token_id, end if place == len(token_ids) - 1 else ""))
        if piece is not None:
            pieces.append(piece)
            if piece.finish_reason:
                break
    return pieces


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The obvious way: grow the text letter by letter until a stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def splits(text: str, cuts: Sequence[int]) -> list[int]:
    """Token ids of a text that was cut at random places, so that tokens fall differently each time; cuts may halve characters."""
    data = text.encode()
    places = sorted({min(place, len(data)) for place in cuts} | {0, len(data)})
    ids = []
    for start, end in itertools.pairwise(places):
        part = data[start:end]
        try:
            ids += tokenizer().encode(part.decode())
        except UnicodeDecodeError:
            ids += [BYTE_IDS[byte] for byte in part]
    return ids


BYTE_IDS = {tokenizer().token_bytes(index)[0]: index for index in range(NUM_IDS) if len(tokenizer().token_bytes(index)) == 1}


def test_every_byte_has_a_token() -> None:
    assert len(BYTE_IDS) == 256


@settings(max_examples=120)
@given(texts, st.lists(st.integers(0, 200), max_size=12), stop_strings)
def test_pieces_make_the_text_up_to_the_first_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    token_ids = splits(text, cuts)
    if not token_ids:
        return
    pieces = run(token_ids, stops)
    expected, hit = cut(tokenizer().decode(token_ids), stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert [piece.finish_reason for piece in pieces][-1] == ("stop" if hit else "length")
    assert not any(piece.finish_reason for piece in pieces[:-1])


@settings(max_examples=200)
@given(st.lists(st.integers(0, NUM_IDS - 1), min_size=1, max_size=30), stop_strings)
def test_any_tokens_at_all_make_the_librarys_text(token_ids: list[int], stops: list[str]) -> None:
    pieces = run(token_ids, stops)
    expected, _ = cut(raw_tokenizer().decode(token_ids, skip_special_tokens=True), stops)
    assert "".join(piece.text for piece in pieces) == expected


@settings(max_examples=200)
@given(texts, st.lists(st.integers(0, 200), max_size=12), stop_strings)
def test_no_more_is_held_back_than_a_stop_string_needs(text: str, cuts: list[int], stops: list[str]) -> None:
    token_ids = splits(text, cuts)
    detokenizer = Detokenizer(tokenizer(), request(stops))
    shown = ""
    for place, token_id in enumerate(token_ids):
        piece = detokenizer.feed(Token(token_id))
        shown += piece.text if piece else ""
        if piece and piece.finish_reason:
            break
        data = b"".join(map(tokenizer().token_bytes, token_ids[: place + 1]))
        known = data.decode("utf-8", "ignore")
        longest = max(
            (size for stop in stops for size in range(1, len(stop)) if known.endswith(stop[:size])),
            default=0,
        )
        assert shown == known[: len(known) - longest]


@pytest.mark.parametrize("text", LANGUAGES)
def test_no_half_character_is_ever_shown(text: str) -> None:
    token_ids = [BYTE_IDS[byte] for byte in text.encode()]
    pieces = run(token_ids)
    assert "�" not in "".join(piece.text for piece in pieces)
    assert len(pieces) == len(text)
    assert sum(piece.num_tokens for piece in pieces) == len(token_ids)


def test_byte_fallback_tokens_wait_for_their_character() -> None:
    fallback = Tokenizer(byte_fallback())
    token_ids = byte_fallback().encode("a😀b").ids
    detokenizer = Detokenizer(fallback, request())
    pieces = [detokenizer.feed(Token(token_id)) for token_id in token_ids]
    assert [piece.text if piece else None for piece in pieces] == ["a", None, None, None, "😀", "b"]


def test_an_output_that_ends_inside_a_character_shows_that_it_did() -> None:
    token_ids = [BYTE_IDS[byte] for byte in "é".encode()[:1]]
    assert [piece.text for piece in run(token_ids)] == ["�"]


def test_the_end_token_is_counted_and_not_shown() -> None:
    pieces = run([*tokenizer().encode("ab"), END], end="stop")
    assert "".join(piece.text for piece in pieces) == "ab"
    assert pieces[-1] == Piece("", 1, (), "stop")


def test_an_end_token_that_is_not_special_is_not_shown_either() -> None:
    ends = tokenizer().encode("<think>")
    detokenizer = Detokenizer(tokenizer(), request(stop_token_ids=tuple(ends)))
    assert detokenizer.feed(Token(ends[0], "stop")) == Piece("", 1, (), "stop")


def test_a_piece_counts_the_tokens_since_the_one_before() -> None:
    a, b, dot = (tokenizer().encode(char)[0] for char in "ab.")
    detokenizer = Detokenizer(tokenizer(), request(["ab."]))
    assert detokenizer.feed(Token(a)) is None
    assert detokenizer.feed(Token(b)) is None
    assert detokenizer.feed(Token(a)) == Piece("ab", 3)
    assert detokenizer.feed(Token(b)) is None
    assert detokenizer.feed(Token(dot)) == Piece("", 2, (), "stop")


def test_finish_shows_what_was_held_back() -> None:
    a, b = (tokenizer().encode(char)[0] for char in "ab")
    detokenizer = Detokenizer(tokenizer(), request(["ab."]))
    detokenizer.feed(Token(a))
    detokenizer.feed(Token(b))
    assert detokenizer.finish("length") == Piece("ab", 2, (), "length")


def test_finish_completes_a_stop_string_with_the_broken_character() -> None:
    detokenizer = Detokenizer(tokenizer(), request(["�"]))
    assert detokenizer.feed(Token(BYTE_IDS[0xC3])) is None
    assert detokenizer.finish("length") == Piece("", 1, (), "stop")


def test_the_stop_string_that_is_complete_first_wins() -> None:
    token_ids = tokenizer().encode("xabcd")
    assert "".join(piece.text for piece in run(token_ids, ["abcd", "c"])) == "xab"


def test_of_several_stop_strings_in_one_token_the_one_that_is_complete_first_wins() -> None:
    words = [(index, tokenizer().token_bytes(index)) for index in range(NUM_IDS)]
    long = [(index, word.decode()) for index, word in words if len(word) >= 5 and word.isascii() and len(set(word)) == len(word)]
    assert long
    for index, word in long:
        for stops in ([word[1:5], word[3]], [word[3], word[1:5]]):
            assert [piece.text for piece in run([index], stops)] == [word[:3]]


def test_logprobs_come_with_text_and_spell_out_tokens() -> None:
    e_acute = [BYTE_IDS[byte] for byte in "é".encode()]
    detokenizer = Detokenizer(tokenizer(), request(num_logprobs=1))
    first = detokenizer.feed(Token(e_acute[0], "", -0.5, (TokenLogprob(END, -0.25),)))
    assert first is None
    second = detokenizer.feed(Token(e_acute[1], "", -1.0, (TokenLogprob(e_acute[1], -1.0),)))
    assert second is not None
    assert second.text == "é"
    assert [(item.text, item.data, item.logprob) for item in second.logprobs] == [("�", b"\xc3", -0.5), ("�", b"\xa9", -1.0)]
    assert second.logprobs[0].top == ((END, "<|im_end|>", b"<|im_end|>", -0.25),)
    end = detokenizer.feed(Token(END, "stop", -0.1))
    assert end == Piece("", 1, (), "stop")
