"""Text to token ids and token ids to bytes, from a checkpoint's tokenizer.json.

Owns the two readings of a text: `encode` takes it as plain text, in which nothing is special, and `encode_raw` lets special
tokens that are spelled out count as such. Knows how a token becomes bytes. Does not know templates, images or streams.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from epd.errors import BadCheckpoint


class Tokenizer:
    """A checkpoint's tokenizer. Immutable after construction, so that threads may share it."""

    def __init__(self, raw: tokenizers.Tokenizer, *, where: str = "tokenizer.json") -> None:
        spelling = raw.to_str()
        self._raw = raw
        self._plain = tokenizers.Tokenizer.from_str(spelling)
        self._plain.encode_special_tokens = True  # the library's name for: do not look for special tokens
        self._to_bytes = _decoding(json.loads(spelling), where)
        added = raw.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        self._special = frozenset(self.special_ids.values())
        for token in added.values():
            if token.special and (token.lstrip or token.rstrip or token.single_word):
                raise BadCheckpoint(f"{where}: the special token {token.content!r} depends on what is around it; not supported")
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special_pattern: re.Pattern[str] | None = (
            re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        )
        vocab = raw.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocab)
        self.max_token_bytes = max((len(token.encode()) for token in vocab), default=1)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`.

        Raises:
            BadCheckpoint: it is missing, broken or decodes in a way that is not supported.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise BadCheckpoint(f"{path} does not exist; is {folder} the folder of a checkpoint?")
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BadCheckpoint(f"{path} cannot be read as a tokenizer: {error}") from error
        raw.no_padding()
        raw.no_truncation()
        return cls(raw, where=str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token that is spelled out in it is cut like any other text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of text that may spell out special tokens; a start token is put first where the checkpoint wants one."""
        return self._raw.encode(text, add_special_tokens=True).ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the output; none for special tokens and for ids without an entry."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = b"" if token_id in self._special else self.spelling(token_id)
        return found

    def spelling(self, token_id: int) -> bytes:
        """The bytes of any token, special ones spelled out: what log probabilities are reported with."""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._special else self._to_bytes(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text of an output, special tokens left out."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class _ByteLevel:
    """GPT-2's alphabet: each byte is one printable character. A token with any other character stands for its own UTF-8."""

    def __init__(self) -> None:
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in printable]
        self._byte = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}

    def __call__(self, token: str) -> bytes:
        try:
            return bytes([self._byte[char] for char in token])
        except KeyError:
            return token.encode()


class _ByteFallback:
    """SentencePiece's way: a mark for the blank, and tokens such as `<0xE2>` for the bytes of rare characters."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._byte = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __call__(self, token: str) -> bytes:
        if match := self._byte.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(self._mark, " ").encode()


def _decoding(spelling: dict[str, object], where: str) -> _ByteLevel | _ByteFallback:
    decoder = spelling.get("decoder")
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {step["type"]: step for step in steps}
    if set(kinds) == {"ByteLevel"}:
        return _ByteLevel()
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        # The text goes on from a prompt, so the blank that Strip would take from the start of a whole text stays.
        return _ByteFallback(kinds.get("Metaspace", {}).get("replacement", "▁"))
    raise BadCheckpoint(f"{where}: cannot decode with {sorted(kinds) or 'no decoder'}; supported are ByteLevel and ByteFallback")
