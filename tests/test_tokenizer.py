from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer

from epd.errors import BadCheckpoint
from epd.tokenizer import Tokenizer
from tests.support.text import LANGUAGES, SPECIAL, raw_tokenizer, tokenizer, write_folder

NUM_IDS = raw_tokenizer().get_vocab_size() + 8


@pytest.mark.parametrize("text", LANGUAGES)
def test_plain_text_is_encoded_as_the_library_does(text: str) -> None:
    assert tokenizer().encode(text) == raw_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_count_only_in_raw_text(name: str) -> None:
    special = tokenizer().special_ids[name]
    text = f"before{name}after"
    assert special in tokenizer().encode_raw(text)
    assert special not in tokenizer().encode(text)
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_ordinary_added_tokens_count_in_plain_text() -> None:
    assert len(tokenizer().encode("<think>")) == 1
    assert tokenizer().decode(tokenizer().encode("<think> so")) == "<think> so"


@given(st.lists(st.integers(0, NUM_IDS - 1), max_size=40))
def test_any_ids_decode_as_the_library_does(token_ids: list[int]) -> None:
    assert tokenizer().decode(token_ids) == raw_tokenizer().decode(token_ids, skip_special_tokens=True)


def test_spelling_shows_special_tokens_and_output_does_not() -> None:
    end = tokenizer().special_ids["<|im_end|>"]
    assert tokenizer().spelling(end) == b"<|im_end|>"
    assert tokenizer().token_bytes(end) == b""
    assert tokenizer().is_special(end)
    assert not tokenizer().is_special(0)


def test_ids_without_an_entry_stand_for_nothing() -> None:
    assert tokenizer().token_bytes(NUM_IDS - 1) == b""
    assert tokenizer().spelling(NUM_IDS - 1) == b""


def test_folder_gives_the_same_tokenizer(tmp_path: Path) -> None:
    loaded = Tokenizer.from_folder(write_folder(tmp_path))
    assert loaded.encode(LANGUAGES[3]) == tokenizer().encode(LANGUAGES[3])
    assert loaded.vocab_size == raw_tokenizer().get_vocab_size()


def test_saved_padding_and_truncation_do_not_apply(tmp_path: Path) -> None:
    raw = RawTokenizer.from_str(raw_tokenizer().to_str())
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.encode(LANGUAGES[0]) == tokenizer().encode(LANGUAGES[0])
    assert loaded.encode_raw("a") == tokenizer().encode_raw("a")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_way_of_decoding_that_is_not_known_is_refused() -> None:
    raw = RawTokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    with pytest.raises(BadCheckpoint, match="WordPiece"):
        Tokenizer(raw)


def test_a_special_token_that_swallows_blanks_is_refused() -> None:
    raw = RawTokenizer.from_str(raw_tokenizer().to_str())
    raw.add_special_tokens([AddedToken("<|greedy|>", lstrip=True)])
    with pytest.raises(BadCheckpoint, match=r"<\|greedy\|>"):
        Tokenizer(raw)


def byte_fallback() -> RawTokenizer:
    """In SentencePiece's manner: a mark for blanks, 256 byte tokens, few words."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    raw = RawTokenizer(model)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw


@given(st.text(alphabet="ab é猫😀", max_size=20))
def test_byte_fallback_decodes_as_the_library_does(text: str) -> None:
    raw = byte_fallback()
    token_ids = raw.encode(text.replace(" ", "▁")).ids
    assert Tokenizer(raw).decode(token_ids) == text == raw.decode(token_ids)


def test_the_decoder_is_found_inside_a_sequence() -> None:
    spelled = json.loads(byte_fallback().to_str())
    assert spelled["decoder"]["type"] == "Sequence"
    assert Tokenizer(byte_fallback()).token_bytes(1 + 0xE2) == b"\xe2"
